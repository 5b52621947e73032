"""Speech: repeatable samples, true word timings, and voices that really differ."""

import itertools
import random
import time

import numpy as np
import numpy.typing as npt
import pytest

from xopd.data.speech import (
    FAST_WPM,
    HELD_OUT_VOICES,
    SAMPLE_RATE_HZ,
    SLOW_WPM,
    TRAINING_VOICES,
    Synthesizer,
    Voice,
    VoiceError,
)
from xopd.data.world import VOCABULARY, draw

TEXT = "start with seven add five take away three"
VOICES = (*TRAINING_VOICES, *HELD_OUT_VOICES)


@pytest.fixture(scope="module")
def synthesizer() -> Synthesizer:
    return Synthesizer()


@pytest.fixture(scope="module")
def spoken(synthesizer: Synthesizer) -> dict[str, npt.NDArray[np.float32]]:
    return {voice.name: synthesizer.say(TEXT, voice, 200, 50).waveform for voice in VOICES}


def median_pitch_hz(waveform: npt.NDArray[np.float32]) -> float:
    """Median over loud 40 ms frames of the strongest autocorrelation peak in 60..400 Hz."""
    frame = int(0.04 * SAMPLE_RATE_HZ)
    shortest, longest = SAMPLE_RATE_HZ // 400, SAMPLE_RATE_HZ // 60
    pitches = []
    for start in range(0, len(waveform) - frame, frame):
        x = waveform[start : start + frame] - waveform[start : start + frame].mean()
        if np.sqrt((x**2).mean()) < 0.03:
            continue
        correlation = np.correlate(x, x, "full")[frame - 1 :]
        lag = shortest + int(correlation[shortest:longest].argmax())
        if correlation[lag] > 0.4 * correlation[0]:
            pitches.append(SAMPLE_RATE_HZ / lag)
    assert len(pitches) > 10
    return float(np.median(pitches))


def mean_spectrum_db(waveform: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Mean power in 40 bands of 200 Hz, in dB, free of loudness."""
    frames = waveform[: len(waveform) // 512 * 512].reshape(-1, 512) * np.hanning(512)
    power = (np.abs(np.fft.rfft(frames))[:, 1:] ** 2).mean(0)
    bands = 10 * np.log10(power[:240].reshape(40, 6).mean(1) + 1e-9)
    return bands - bands.mean()


def test_same_arguments_give_the_same_samples_whatever_came_before(
    synthesizer: Synthesizer,
) -> None:
    # A breathy voice draws noise; a plain one carries its phase from utterance to utterance.
    for voice in (Voice("en-us+f2", "female"), Voice("en-us+m3", "male")):
        first = synthesizer.say(TEXT, voice, 280, 50)
        synthesizer.say("put in order nine one", TRAINING_VOICES[-1], 190, 40)
        if voice.speaker == "female":
            time.sleep(1.1)  # a generator seeded from the clock changes once a second
        second = synthesizer.say(TEXT, voice, 280, 50)
        np.testing.assert_array_equal(first.waveform, second.waveform)
        assert first.word_start_ms == second.word_start_ms


def test_waveform_form(spoken: dict[str, npt.NDArray[np.float32]]) -> None:
    for waveform in spoken.values():
        assert waveform.dtype == np.float32
        assert waveform.ndim == 1
        assert np.isfinite(waveform).all()
        assert 0.1 < np.abs(waveform).max() <= 1.0
        assert abs(waveform[0]) > 1e-3  # silence is trimmed at both ends
        assert abs(waveform[-1]) > 1e-3


def test_word_timings_are_monotone_and_inside_the_audio(synthesizer: Synthesizer) -> None:
    rng = random.Random(3)
    for _ in range(40):
        text, voice = draw(rng).text, rng.choice(VOICES)
        rate_wpm = rng.choice([*SLOW_WPM, *FAST_WPM])
        speech = synthesizer.say(text, voice, rate_wpm, rng.randint(35, 65))
        starts = speech.word_start_ms
        assert len(starts) == len(text.split())
        assert starts[0] == 0
        assert all(a < b for a, b in itertools.pairwise(starts))
        assert starts[-1] < 1000 * len(speech.waveform) / SAMPLE_RATE_HZ


def test_word_timings_point_at_the_words(synthesizer: Synthesizer) -> None:
    # The last word's own sound is what follows its start: a longer word leaves more behind it.
    def tail_ms(word: str) -> float:
        speech = synthesizer.say(f"say backwards two {word}", TRAINING_VOICES[0], 200, 50)
        return 1000 * len(speech.waveform) / SAMPLE_RATE_HZ - speech.word_start_ms[-1]

    assert tail_ms("seventeen") > tail_ms("two") + 150


def test_every_word_is_spoken_as_one_word(synthesizer: Synthesizer) -> None:
    for word in VOCABULARY:
        if word != ".":
            assert len(synthesizer.say(word, TRAINING_VOICES[0], 200, 50).word_start_ms) == 1


def test_male_and_female_voices_differ_in_pitch(
    spoken: dict[str, npt.NDArray[np.float32]],
) -> None:
    for voice in VOICES:
        pitch_hz = median_pitch_hz(spoken[voice.name])
        if voice.speaker == "male":
            assert 70 < pitch_hz < 145, (voice, pitch_hz)
        else:
            assert 165 < pitch_hz < 320, (voice, pitch_hz)


def test_voices_have_timbres_of_their_own(spoken: dict[str, npt.NDArray[np.float32]]) -> None:
    spectra = {name: mean_spectrum_db(waveform) for name, waveform in spoken.items()}
    for (a, x), (b, y) in itertools.combinations(spectra.items(), 2):
        assert np.sqrt(((x - y) ** 2).mean()) > 1.5, (a, b)  # dB over the bands


def test_voice_table_is_balanced_and_disjoint() -> None:
    names = [voice.name for voice in VOICES]
    assert len(set(names)) == len(names)
    speakers = [voice.speaker for voice in TRAINING_VOICES]
    assert len(speakers) >= 8
    assert speakers.count("male") == speakers.count("female")
    assert sorted(voice.speaker for voice in HELD_OUT_VOICES) == ["female", "male"]


def test_speed_classes_differ(synthesizer: Synthesizer) -> None:
    voice = TRAINING_VOICES[0]
    slow = synthesizer.say(TEXT, voice, SLOW_WPM[1], 50).waveform
    fast = synthesizer.say(TEXT, voice, FAST_WPM[0], 50).waveform
    assert len(slow) > 1.1 * len(fast)


@pytest.mark.parametrize("name", ["en-us+nobody", "en-us", "xx-yy+m3", "en-us+../m3"])
def test_unknown_voice_is_refused(synthesizer: Synthesizer, name: str) -> None:
    with pytest.raises(VoiceError, match="voice"):
        synthesizer.say(TEXT, Voice(name, "male"), 200, 50)


@pytest.mark.parametrize(
    ("text", "rate_wpm", "pitch", "message"),
    [
        (" ", 200, 50, "text"),
        ("one\0two", 200, 50, "text"),
        (TEXT, 20, 50, "rate_wpm is 20"),
        (TEXT, 200, 100, "pitch is 100"),
    ],
)
def test_bad_arguments_are_refused(
    synthesizer: Synthesizer, text: str, rate_wpm: int, pitch: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        synthesizer.say(text, TRAINING_VOICES[0], rate_wpm, pitch)


def test_text_that_is_not_plain_words_is_refused(synthesizer: Synthesizer) -> None:
    with pytest.raises(RuntimeError, match="timed"):
        synthesizer.say("add .", TRAINING_VOICES[0], 200, 50)
