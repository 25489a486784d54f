from support_stack import tiny_base

__all__ = ["tiny_base"]
