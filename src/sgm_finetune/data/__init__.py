"""Data: named sources and files in, three disjoint splits and encoded sequences out."""

from sgm_finetune.data.encoding import Encoded, collator, encode, encoding_summary
from sgm_finetune.data.splits import DataSplits, load_splits

__all__ = ["DataSplits", "Encoded", "collator", "encode", "encoding_summary", "load_splits"]
