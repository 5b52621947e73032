"""Speech with word timings from espeak-ng, a small formant synthesiser that needs no model weights.

The library comes with the pip package ``espeakng-loader`` and is called through ctypes. The
library keeps state of its wave generator between utterances, and initialising it again does not
reset that. `Synthesizer.say` therefore unloads the library after every utterance, which makes the
waveform a function of the arguments alone and costs about 5 ms.
"""

import ctypes
import os
import threading
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self

import espeakng_loader
import numpy as np
import numpy.typing as npt
import soxr

from xopd.errors import UserError

SAMPLE_RATE_HZ: Final = 16_000

Speaker = Literal["male", "female"]
Speed = Literal["slow", "fast"]

SLOW_WPM: Final = (180, 215)
"""Range of the speaking rate, in words per minute and both ends included, of speed class slow."""
FAST_WPM: Final = (270, 310)
"""The same for speed class fast; the gap between the classes leaves no doubtful case."""
PITCH_RANGE: Final = (35, 65)
"""Range of the pitch setting drawn for a corpus; espeak-ng's own range is 0..99."""


@dataclass(frozen=True, slots=True)
class Voice:
    """An espeak-ng voice ``language+variant`` and the class of speaker that it sounds like."""

    name: str
    speaker: Speaker


TRAINING_VOICES: Final[tuple[Voice, ...]] = (
    Voice("en-us+m3", "male"),
    Voice("en-us+m7", "male"),
    Voice("en-gb-x-rp+m1", "male"),
    Voice("en-gb-scotland+Michael", "male"),
    Voice("en-us+f2", "female"),
    Voice("en-us+f3", "female"),
    Voice("en-gb-x-rp+f4", "female"),
    Voice("en-gb-scotland+Annie", "female"),
)
HELD_OUT_VOICES: Final[tuple[Voice, ...]] = (
    Voice("en-us+m4", "male"),
    Voice("en-us+belinda", "female"),
)


class Utterance(NamedTuple):
    """Speech without leading and trailing silence, and where each word of its text starts."""

    waveform: npt.NDArray[np.float32]  # [samples] in -1..1, 16 kHz
    word_start_ms: tuple[int, ...]  # one a word, not decreasing, the first is 0


class VoiceError(UserError):
    """espeak-ng lacks a voice; by itself it would speak with another one."""


# Constants of espeak-ng's speak_lib.h.
_OUTPUT_SYNCHRONOUS: Final = 2
_POSITION_CHARACTER: Final = 1
_CHARACTERS_UTF8: Final = 1
_PARAMETER_RATE: Final = 1
_PARAMETER_PITCH: Final = 3
_EVENT_LIST_END: Final = 0
_EVENT_WORD: Final = 1
_CONTINUE: Final = 0

_NOISE_SEED: Final = 1  # not 0, which espeak-ng takes for "seed from the clock"

_SILENCE_LEVEL: Final = 1e-3
_RATE_LIMITS_WPM: Final = (80, 449)
_PITCH_LIMITS: Final = (0, 99)


class _EventId(ctypes.Union):
    _fields_ = [
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    ]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_AudioCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Library:
    """One loaded and initialised copy of espeak-ng; a context manager that unloads it."""

    def __init__(self) -> None:
        path = espeakng_loader.get_library_path()
        self._path = str(path)
        self.c = ctypes.CDLL(self._path)
        self.c.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint),
            *(ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
        ]
        data_path = os.fsencode(espeakng_loader.get_data_path())
        self.sample_rate_hz = int(self.c.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, data_path, 0))
        if self.sample_rate_hz <= 0:
            raise RuntimeError(
                f"espeak_Initialize returned {self.sample_rate_hz} for the data in {data_path!r}; "
                "reinstall espeakng-loader"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.c.espeak_Terminate()
        process = ctypes.CDLL(None)
        process.dlclose.argtypes = [ctypes.c_void_p]
        process.dlclose(self.c._handle)
        try:
            ctypes.CDLL(self._path, mode=os.RTLD_NOLOAD)
        except OSError:
            return  # unloaded, as it must be
        raise RuntimeError(
            f"{self._path} is still loaded after dlclose, so its state would leak into the next "
            "utterance; another package in this process holds it open: synthesise in a process "
            "of its own"
        )


# The library is one per process, whatever the number of Synthesizer objects.
_LIBRARY_LOCK: Final = threading.Lock()


class Synthesizer:
    """Turns text into speech with espeak-ng.

    Raises on construction:
        VoiceError: the installed data lacks a voice of TRAINING_VOICES or HELD_OUT_VOICES.
    """

    def __init__(self) -> None:
        self._chunks: list[npt.NDArray[np.int16]] = []
        self._word_ms: list[int] = []
        # C keeps only the address: the callback must live as long as the object.
        self._callback = _AudioCallback(self._on_audio)
        for voice in (*TRAINING_VOICES, *HELD_OUT_VOICES):
            check_voice(voice.name)

    def say(self, text: str, voice: Voice, rate_wpm: int, pitch: int) -> Utterance:
        """Speaks `text`; the same arguments always give the same samples.

        Args:
            text: words separated by spaces.
            voice: any voice of the installed data.
            rate_wpm: speaking rate, 80..449 words per minute.
            pitch: espeak-ng's pitch setting, 0..99; 50 is the voice's own pitch.

        Raises:
            VoiceError: espeak-ng does not have the voice.
            ValueError: an argument is out of range or `text` has no words.
            RuntimeError: espeak-ng failed, gave no sound, or timed another number of words.
        """
        words = text.split()
        if not words or "\0" in text:
            raise ValueError(f"text is {text!r}; give at least one word and no NUL character")
        _check_range("rate_wpm", rate_wpm, _RATE_LIMITS_WPM)
        _check_range("pitch", pitch, _PITCH_LIMITS)
        check_voice(voice.name)
        with _LIBRARY_LOCK, _Library() as library:
            self._chunks, self._word_ms = [], []
            self._run(library.c, " ".join(words), voice.name, rate_wpm, pitch)
            source_rate_hz = library.sample_rate_hz
        if len(self._word_ms) != len(words):
            raise RuntimeError(
                f"espeak-ng timed {len(self._word_ms)} words of the {len(words)} in {text!r}; "
                "write numbers and abbreviations as plain words"
            )
        if not self._chunks:
            raise RuntimeError(f"espeak-ng gave no audio for {text!r}")
        source = np.concatenate(self._chunks).astype(np.float32) / 32768.0
        waveform = soxr.resample(source, source_rate_hz, SAMPLE_RATE_HZ, quality="HQ")
        return _trim(np.clip(waveform, -1.0, 1.0).astype(np.float32), self._word_ms, text)

    def _run(self, library: ctypes.CDLL, text: str, voice: str, rate_wpm: int, pitch: int) -> None:
        # Initialisation seeds the noise of breathy voices from the clock.
        library.espeak_ng_SetRandSeed(ctypes.c_long(_NOISE_SEED))
        library.espeak_SetSynthCallback(self._callback)
        status = library.espeak_SetVoiceByName(voice.encode())
        if status != 0:
            raise VoiceError(f"espeak-ng has no voice {voice!r} (status {status}); {_VOICE_HELP}")
        library.espeak_SetParameter(_PARAMETER_RATE, rate_wpm, 0)
        library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        data = text.encode() + b"\0"
        start, flags = 0, _CHARACTERS_UTF8
        status = library.espeak_Synth(
            data, len(data), start, _POSITION_CHARACTER, 0, flags, None, None
        )
        if status != 0:
            raise RuntimeError(f"espeak_Synth returned status {status} for {text!r}")

    def _on_audio(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _EVENT_LIST_END:
            if events[index].type == _EVENT_WORD:
                self._word_ms.append(int(events[index].audio_position_ms))
            index += 1
        return _CONTINUE


_VOICE_HELP: Final = "use 'language+variant' with files that exist in espeak-ng's data"


def check_voice(name: str) -> None:
    """Raises VoiceError unless `name` is ``language+variant`` and the data holds the variant.

    espeak-ng accepts an unknown variant without a word and speaks the plain language voice.
    """
    _, plus, variant = name.partition("+")
    folder = Path(espeakng_loader.get_data_path(), "voices", "!v")
    if not plus or variant not in os.listdir(folder):
        raise VoiceError(f"voice name {name!r}: no variant {variant!r} in {folder}; {_VOICE_HELP}")


def engine_version() -> str:
    """Names the packages on which a waveform depends, with versions: a key for a cache."""
    packages = ("espeakng-loader", "soxr", "numpy")
    return " ".join(f"{package}={version(package)}" for package in packages)


def _check_range(name: str, value: int, limits: tuple[int, int]) -> None:
    low, high = limits
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; give a whole number from {low} to {high}")


def _trim(waveform: npt.NDArray[np.float32], word_ms: list[int], text: str) -> Utterance:
    loud = np.flatnonzero(np.abs(waveform) > _SILENCE_LEVEL)
    if loud.size == 0:
        raise RuntimeError(f"espeak-ng gave only silence for {text!r}")
    first, last = int(loud[0]), int(loud[-1])
    lead_ms = round(1000 * first / SAMPLE_RATE_HZ)
    starts = tuple(max(0, start - lead_ms) for start in word_ms)
    return Utterance(waveform[first : last + 1], (0, *starts[1:]))
