"""The error of every option that cannot be used."""

from common.errors import SettingsError

__all__ = ["SettingsError"]
