"""Settings of a server, from the command line, the environment (``LIBORTHO_SERVE_...``) and a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from libortho.core.errors import ConfigError

Count = Annotated[int, Field(ge=1)]


class ServeConfig(BaseSettings):
    """How a server answers. What is given directly counts most, then the environment, then the file."""

    model_config = SettingsConfigDict(env_prefix="LIBORTHO_SERVE_", extra="forbid", frozen=True)

    name: str | None = None
    """What the model is called; the last part of its directory without it."""
    keys: Path | None = None
    """File of API keys; without it nobody may ask for a stream."""
    require_key: bool = False
    """Refuse requests without a key; otherwise they get the base."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=65536)] = 8000
    audit_log: Path | None = None
    """Where a line goes for each request; the log of the process without it."""
    log_prompts: bool = False
    """Write prompts into the audit lines."""
    most_rows: Count = 32
    """Answers that are given at a time."""
    most_waiting: Annotated[int, Field(ge=2)] = 256
    """Answers that may wait for their turn; more are refused with 429."""
    most_tokens: Count = 1024
    """Most tokens of one answer."""
    body_bytes: Count = 2**20
    """Most bytes of a request."""
    body_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Longest time that a request may take to arrive."""
    answer_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest time that an answer may take."""
    timing: Literal["plain", "constant"] = "plain"
    """Whether streams that are off are computed all the same, so that the time of an answer does not tell."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """No ``.env`` file, which would be read from wherever the server is started."""
        return (init_settings, env_settings)


def read_config(path: Path | None = None, **given: Any) -> ServeConfig:
    """The settings: those given that are not None, those of the environment, and those of the file.

    Raises:
        ConfigError: if the file cannot be read, or a setting is unknown or out of range.
    """
    direct = {n: v for n, v in given.items() if v is not None}
    if path is not None and not path.is_file():
        raise ConfigError(f"{path} is no file; expected a TOML file of settings")
    try:
        if path is None:
            return ServeConfig(**direct)

        class FromFile(ServeConfig):
            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], *sources: Any, **named: Any
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                before = super().settings_customise_sources(settings_cls, *sources, **named)
                return (*before, TomlConfigSettingsSource(settings_cls, path))

        return FromFile(**direct)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(ServeConfig.model_fields)
            raise ConfigError(f"unknown setting {where}; the settings are {known}") from error
        raise ConfigError(f"setting {where}: {first['msg']}, given {first['input']!r}") from error
    except ValueError as error:  # TOML
        raise ConfigError(f"{path} cannot be read as TOML ({error})") from error
