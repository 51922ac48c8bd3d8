"""The error of every option that cannot be used."""


class SettingsError(ValueError):
    """A setting that cannot be used; the message is one line: which, why, and what would be right."""
