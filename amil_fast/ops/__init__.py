"""The package's operators: public functions, checks, backend choice, ``torch.library`` registration, references."""

from amil_fast.ops.adjust_pool import adjust_pool

__all__ = ["adjust_pool"]
