"""Stands in for ml_collections on a machine that lacks it: a dictionary with attributes."""


class ConfigDict(dict):
    """A dictionary whose values are attributes too; dictionaries in it become the same."""

    def __init__(self, values=()):
        super().__init__({k: ConfigDict(v) if isinstance(v, dict) else v for k, v in dict(values).items()})

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__

    def to_dict(self):
        """Plain dictionaries."""
        return {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in self.items()}
