"""`SGMTrainer`, Transformers' Trainer for merged models, where scripts of the method expect it."""

from sgm_finetune import SGMTrainer

__all__ = ["SGMTrainer"]
