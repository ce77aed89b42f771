from verl import nothing_else

__getattr__ = nothing_else(__name__)
