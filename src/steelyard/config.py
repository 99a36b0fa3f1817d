"""What every configuration has in common: frozen, and no unknown field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all configurations: immutable, unknown fields refused by name, defaults validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    def given(self) -> set[str]:
        """The fields that somebody chose, to refuse those that would have no effect.

        Where every field is set (a resolved file, a command line), it cannot be told which were chosen: then those
        that differ from their default.
        """
        fields = type(self).model_fields
        if self.model_fields_set != set(fields):
            return set(self.model_fields_set)
        return {n for n, field in fields.items() if getattr(self, n) != field.get_default(call_default_factory=True)}
