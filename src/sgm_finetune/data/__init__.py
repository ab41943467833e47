"""Data: named sources and files in, three disjoint splits and encoded sequences out."""

from sgm_finetune.data.encoding import Encoded, collator, encode, encoding_summary, fingerprint, pack
from sgm_finetune.data.splits import SPLITS, DataSplits, load_splits

__all__ = [
    "SPLITS", "DataSplits", "Encoded", "collator", "encode", "encoding_summary", "fingerprint", "load_splits", "pack",
]  # fmt: skip
