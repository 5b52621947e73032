"""The configuration of a run: one tree of frozen dataclasses, from strict YAML and overrides.

Every field carries its meaning in the string below it; `xopd config`, `--help` and the comments of
a dumped file are made from these strings, so they cannot drift from the code. Types and ranges are
checked when a section is built, wherever it is built: from a file, an override or Python.
"""

from __future__ import annotations

import difflib
import inspect
import math
import textwrap
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from xopd.schema import (
    ConfigError,
    FieldSpec,
    Section,
    field_docstrings,
    field_specs,
    parse_text,
    read_strict_yaml,
)
from xopd.sections import (
    BackendChoice,
    DataConfig,
    Dtype,
    LossConfig,
    ModelConfig,
    OldLogprob,
    OptimConfig,
    RolloutConfig,
    RolloutEngine,
    ShardingConfig,
    TrainConfig,
)
from xopd.vllm.options import (
    HttpConfig,
    ServerConfig,
    TeacherConfig,
    VllmConfig,
    check_temperature,
)

__all__ = [
    "BackendChoice",
    "Config",
    "ConfigError",
    "DataConfig",
    "Dtype",
    "FieldDoc",
    "HttpConfig",
    "LossConfig",
    "ModelConfig",
    "OldLogprob",
    "OptimConfig",
    "RolloutConfig",
    "RolloutEngine",
    "ServerConfig",
    "ShardingConfig",
    "TeacherConfig",
    "TrainConfig",
    "VllmConfig",
    "config_template",
    "config_to_dict",
    "dump_config",
    "field_docs",
    "load_config",
]


@dataclass(frozen=True)
class Config:
    """The whole tree; one section per stage."""

    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    http: HttpConfig = field(default_factory=HttpConfig)

    def __post_init__(self) -> None:
        _check_engine(self)
        if self.teacher.urls is not None:
            _check_length("teacher", self.teacher.max_model_len, self)
        if self.teacher.urls is not None and self.rollout.temperature != 1.0:
            raise ConfigError(
                f"rollout.temperature is {self.rollout.temperature}, and vLLM scores prompts at 1 "
                "only: set it to 1, or teacher.urls to null"
            )
        if self.loss.max_gradient_error is not None and self.sharding.vocab_parallel_head:
            raise ConfigError(
                f"loss.max_gradient_error is {self.loss.max_gradient_error}, but with "
                "sharding.vocab_parallel_head no rank sees all classes of a token: set the first "
                "to null or the second to false"
            )
        # Each modality is dealt out to minibatches; an empty one would be a step on no data.
        rollouts = self.rollout.prompts_per_step * self.rollout.rollouts_per_prompt
        if self.loss.minibatches > rollouts:
            raise ConfigError(
                f"loss.minibatches is {self.loss.minibatches}, more than the {rollouts} rollouts "
                "of a modality (rollout.prompts_per_step * rollout.rollouts_per_prompt): lower it"
            )


_SECTIONS: Mapping[str, type[Section]] = types.MappingProxyType(
    {
        "model": ModelConfig,
        "data": DataConfig,
        "rollout": RolloutConfig,
        "loss": LossConfig,
        "optim": OptimConfig,
        "sharding": ShardingConfig,
        "train": TrainConfig,
        "vllm": VllmConfig,
        "server": ServerConfig,
        "teacher": TeacherConfig,
        "http": HttpConfig,
    }
)


def _check_length(section: str, max_model_len: int, config: Config) -> None:
    """Refuse a length that leaves no room for a prompt beside the longest response."""
    if max_model_len <= config.rollout.max_new_tokens:
        raise ConfigError(
            f"{section}.max_model_len is {max_model_len} tokens for prompt and response, and "
            f"rollout.max_new_tokens {config.rollout.max_new_tokens}: raise the first"
        )


def _check_engine(config: Config) -> None:
    """Refuse settings of a rollout engine that do not go together."""
    rollout, vllm = config.rollout, config.vllm
    if rollout.engine is RolloutEngine.GENERATE:
        if config.loss.old_logprob is OldLogprob.ENGINE:
            raise ConfigError(
                "loss.old_logprob is engine, but rollout.engine generate gives no log-probs: set "
                "it to auto or recomputed"
            )
        if rollout.max_staleness:
            raise ConfigError(
                "rollout.max_staleness is 1, but rollout.engine generate computes where the "
                "trainer does: set it to 0, or sample with vllm or server"
            )
        return
    check_temperature(rollout.temperature)
    _check_length("vllm", vllm.max_model_len, config)
    if vllm.sleep and rollout.engine is RolloutEngine.SERVER:
        raise ConfigError("vllm.sleep is true, but a server has GPUs of its own: set it to false")
    if rollout.max_staleness and (vllm.sleep or not vllm.own_process):
        raise ConfigError(
            "rollout.max_staleness is 1, so the engine samples while the trainer computes: set "
            "vllm.sleep to false and vllm.own_process to true"
        )


class FieldDoc(NamedTuple):
    """One line of help: a field, what it takes and what it means."""

    name: str  # "loss.text_weight"
    takes: str  # "float in [0, 1]"
    default: object  # dataclasses.MISSING where the field is required
    doc: str


def load_config(path: Path | None, overrides: Sequence[str]) -> Config:
    """Reads the YAML file `path` (None: nothing but defaults), then applies `section.field=value`.

    Later overrides win over earlier ones and over the file. Raises ConfigError for an unreadable
    file, an unknown key, a wrong type, a value out of range or a required field left unset.
    """
    values: dict[str, dict[str, object]] = {name: {} for name in _SECTIONS}
    if path is not None:
        for key, given in read_strict_yaml(path).items():
            section = str(key)
            if section not in _SECTIONS:
                raise _unknown(section, list(_SECTIONS))
            if not isinstance(given, dict):
                raise ConfigError(f"{section}: expected a mapping of fields, got {given!r}")
            for leaf, value in given.items():
                values[section][_find_spec(section, str(leaf)).leaf] = value
    for override in overrides:
        name, separator, text = override.partition("=")
        section, dot, leaf = name.strip().partition(".")
        if not separator or not dot:
            raise ConfigError(f"override {override!r}: expected section.field=value")
        if section not in _SECTIONS:
            raise _unknown(section, list(_SECTIONS))
        spec = _find_spec(section, leaf)
        values[section][spec.leaf] = parse_text(spec, text.strip())
    built: dict[str, Any] = {name: _build(name, values[name]) for name in _SECTIONS}
    return Config(**built)


def config_to_dict(config: Config) -> dict[str, dict[str, bool | int | float | str | None]]:
    """The tree as plain dicts of JSON-able scalars (enum members as their text)."""
    tree: dict[str, dict[str, bool | int | float | str | None]] = {}
    for section in _SECTIONS:
        part = getattr(config, section)
        tree[section] = {}
        for item in fields(part):
            value = getattr(part, item.name)
            tree[section][item.name] = str(value) if isinstance(value, StrEnum) else value
    return tree


def dump_config(config: Config) -> str:
    """YAML text of `config` with each field's meaning as a comment; load_config reads it back."""
    tree = config_to_dict(config)
    values = {f"{name}.{leaf}": part[leaf] for name, part in tree.items() for leaf in part}
    return _render(values)


def config_template() -> str:
    """A file of all defaults with comments; required fields are null, to be filled in."""
    return _render({d.name: None if d.default is MISSING else d.default for d in field_docs()})


def field_docs() -> tuple[FieldDoc, ...]:
    """Every field in file order: name, what it takes, default and meaning."""
    found: list[FieldDoc] = []
    for section in _SECTIONS.values():
        docs = field_docstrings(section)
        for spec in field_specs(section):
            found.append(FieldDoc(spec.name, spec.takes, spec.default, docs[spec.leaf]))
    return tuple(found)


def _render(values: Mapping[str, object]) -> str:
    lines: list[str] = []
    for section, cls in _SECTIONS.items():
        docs = field_docstrings(cls)
        lines += ["", f"# {inspect.getdoc(cls)}", f"{section}:"]
        for spec in field_specs(cls):
            note = "required" if spec.default is MISSING else f"default {_scalar(spec.default)}"
            comment = f"{docs[spec.leaf]} ({spec.takes}; {note})"
            lines += textwrap.wrap(comment, 98, initial_indent="  # ", subsequent_indent="  # ")
            lines.append(f"  {spec.leaf}: {_scalar(values[spec.name])}")
    return "\n".join(lines[1:]) + "\n"


def _scalar(value: object) -> str:
    plain = str(value) if isinstance(value, StrEnum) else value
    # One-element list in flow style: the only form in which PyYAML adds no document end marker.
    text: str = yaml.safe_dump([plain], default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.strip()[1:-1]


def _build(section: str, values: dict[str, Any]) -> Section:
    for spec in field_specs(_SECTIONS[section]):
        if spec.default is MISSING and values.get(spec.leaf) is None:
            raise ConfigError(
                f"{spec.name} is required: set it in the config file or with {spec.name}=VALUE"
            )
    return _SECTIONS[section](**values)


def _find_spec(section: str, leaf: str) -> FieldSpec:
    specs = {spec.leaf: spec for spec in field_specs(_SECTIONS[section])}
    if leaf not in specs:
        raise _unknown(f"{section}.{leaf}", [spec.name for spec in specs.values()])
    return specs[leaf]


def _unknown(name: str, candidates: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, candidates, n=1)
    if not near:  # perhaps the right field in the wrong section
        everywhere = {s.leaf: s.name for cls in _SECTIONS.values() for s in field_specs(cls)}
        leaf = difflib.get_close_matches(name.rpartition(".")[2], list(everywhere), n=1)
        near = [everywhere[leaf[0]]] if leaf else []
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(candidates)}"
    return ConfigError(f"unknown key {name!r}; {hint}")
