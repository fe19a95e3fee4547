import re
from math import nan
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor
from torchmetrics import Metric
from transformers import MusicgenForConditionalGeneration

from musicgen_eval.api import generate
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.errors import MetricError
from musicgen_eval.inference.scoring import nll_from_logits
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.metrics import Memorisation
from musicgen_eval.metrics.memorisation import is_match
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.metrics.plugin.inputs import ContinuationAudio, WindowData
from musicgen_eval.metrics.plugin.states import is_sum_metric
from musicgen_eval.models.delay import delay_codes
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.records import CodecSpec, ScoredWindow, Window

DOCS = (Path(__file__).parent.parent.parent / "docs" / "metrics.md").read_text()
PROMPT, TARGET = 3, 10  # frames
DURATION_S = TARGET / 50


def shown(name: str) -> str:
    """Returns the block of docs/metrics.md that follows a mark."""
    return re.search(rf"<!-- tested: {name} -->\n```yaml\n(.*?)```", DOCS, re.DOTALL)[1]


def spec(channels: int = 1, K: int = 4) -> CodecSpec:
    delays = tuple(range(K)) if channels == 1 else tuple(k // 2 for k in range(K))
    return CodecSpec(32000, 50, 640, K, 2048, channels, delays, 1500)


def continuation(generated: Tensor, reference: Tensor | None, *, rank: int = 0, prompt: int = PROMPT) -> WindowData:
    """Returns the data of a continuation with (K, T) generated codes and (K, R) codes of the reference, R <= T."""
    K, T = generated.shape
    window = Window("song", 0, 0, prompt, T)

    def read(codes: Tensor) -> ScoredWindow:
        scored = torch.zeros(K, prompt + T, dtype=torch.bool)
        scored[:, prompt : prompt + codes.shape[1]] = True
        missing = T - codes.shape[1]
        return ScoredWindow(
            window=window,
            codes=torch.nn.functional.pad(codes, (prompt, missing)),
            scored=scored,
            nll=torch.where(scored, 1.0, nan),
            rank=torch.where(scored, rank, -1),
        )

    readings = {"": read(generated), "reference": None if reference is None else read(reference)}
    return WindowData(readings, 50, ContinuationAudio(32000, None))


def measured(data: list[WindowData], *, channels: int = 1, **arguments) -> dict[str, float]:
    """Returns the results of a run's metric bank."""
    K = data[0].readings[""].codes.shape[0]
    metric = Memorisation(**{"duration_s": DURATION_S, **arguments})
    bank = MetricBank({"memorisation": metric}, spec=spec(channels, K), task="continue")
    return bank.compute(bank.update(data))["memorisation"]


def random_codes(generator: torch.Generator, K: int = 4, T: int = TARGET) -> Tensor:
    return torch.randint(2048, (K, T), generator=generator)


def with_errors(codes: Tensor, num_errors: int, codebook: int = 0) -> Tensor:
    """Returns a copy of the codes in which the last `num_errors` codes of one codebook are different."""
    changed = codes.clone()
    changed[codebook, codes.shape[1] - num_errors :] += 1
    return changed


def brute_force(data: list[WindowData], duration_s: float, threshold: float) -> dict[str, float]:
    """Computes the definition for mono in plain loops."""
    num_frames = round(duration_s * 50)
    exact, partial, shares, prompts = [], [], [], []
    for item in data:
        own, true = item.readings[""], item.readings["reference"]
        start, end = own.window.context_frames, own.window.num_frames
        if true is None or end - start < num_frames or not bool(true.scored[0, start + num_frames - 1]):
            continue
        rows = [
            [own.codes[k, t].item() == true.codes[k, t].item() for t in range(start, start + num_frames)]
            for k in range(len(own.codes))
        ]
        exact.append(all(rows[0]))
        partial.append(rows[0].count(True) * 1000 >= round(threshold * 1000) * num_frames)
        shares.append([row.count(True) / num_frames for row in rows])
        prompts.append(start / 50)
    n = len(exact)
    match = [sum(share[k] for share in shares) / n for k in range(len(shares[0]))]
    return {
        "exact": sum(exact) / n,
        "partial": sum(partial) / n,
        "match": sum(match) / len(match),
        **{f"match_q{k}": value for k, value in enumerate(match, start=1)},
        "greedy": 1.0,
        "prompt_s": sum(prompts) / n,
        "continuations": n,
    }


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([0.5, 0.7, 0.8, 0.9, 1.0]), st.integers(1, 12))
def test_the_results_equal_brute_force(seed, threshold, num_frames):
    generator = torch.Generator().manual_seed(seed)
    data = []
    for index in range(8):
        true = torch.randint(3, (2, 10), generator=generator)
        errors = torch.rand(true.shape, generator=generator) < 0.07 * index
        own = torch.where(errors, (true + 1) % 3, true)
        length = int(torch.randint(6, 11, (), generator=generator))
        data.append(continuation(own, None if index == 5 else true[:, :length], prompt=1 + index))
    true = torch.randint(3, (2, 15), generator=generator)
    data.append(continuation(true, true))
    found = measured(data, duration_s=num_frames / 50, threshold=threshold)
    assert found == pytest.approx(brute_force(data, num_frames / 50, threshold), abs=1e-12)


def test_a_memorised_track_is_found_and_random_codes_are_not(generator):
    memorised, unknown = ([random_codes(generator, T=250) for _ in range(5)] for _ in range(2))
    data = [continuation(codes, codes) for codes in memorised]
    data += [continuation(random_codes(generator, T=250), codes) for codes in unknown]
    found = measured(data, duration_s=5.0)
    assert (found["exact"], found["partial"], found["continuations"]) == (0.5, 0.5, 10)
    assert found["match_q1"] == pytest.approx(0.5, abs=0.005)  # random codes agree in 1 of 2048 frames
    unrelated = measured(data[5:], duration_s=5.0)
    assert (unrelated["exact"], unrelated["partial"]) == (0, 0)
    assert unrelated["match"] < 0.005


@pytest.mark.parametrize(("num_errors", "exact", "partial"), [(0, 1, 1), (1, 0, 1), (2, 0, 1), (3, 0, 0), (10, 0, 0)])
def test_at_least_80_percent_of_the_codes_are_a_partial_match(generator, num_errors, exact, partial):
    true = random_codes(generator)
    found = measured([continuation(with_errors(true, num_errors), true)])
    assert (found["exact"], found["partial"]) == (exact, partial)
    assert found["match_q1"] == pytest.approx(1 - num_errors / 10)
    assert found["match"] == pytest.approx(1 - num_errors / 40)


@pytest.mark.parametrize("num_frames", [5, 15, 35, 250, 1000])
def test_exactly_the_threshold_is_a_partial_match(num_frames):
    needed = num_frames * 4 // 5
    for num_equal in (needed - 1, needed):
        equal = torch.arange(num_frames) < num_equal
        assert is_match(equal, threshold=0.8)[1] == (num_equal == needed)


def test_only_the_first_codebook_decides_about_matches(generator):
    true = random_codes(generator)
    other = with_errors(with_errors(true, 10, codebook=1), 10, codebook=3)
    found = measured([continuation(other, true)])
    assert (found["exact"], found["partial"], found["match"]) == (1, 1, 0.5)
    assert [found[f"match_q{k}"] for k in (1, 2, 3, 4)] == [1, 0, 1, 0]


def test_in_stereo_the_first_codebooks_of_both_channels_decide(generator):
    true = random_codes(generator, K=8)
    left, right, fine = (with_errors(true, 5, codebook=k) for k in (0, 1, 2))
    found = [measured([continuation(codes, true)], channels=2) for codes in (true, left, right, fine)]
    assert [result["exact"] for result in found] == [1, 0, 0, 1]
    assert [result["partial"] for result in found] == [1, 0, 0, 1]  # 15 of 20 codes are equal
    assert [result["greedy"] for result in found] == [1, 1, 1, 1]


def test_only_the_first_seconds_of_a_continuation_are_compared(generator):
    true = random_codes(generator, T=30)
    found = measured([continuation(with_errors(true, 20), true)])
    assert (found["exact"], found["match"]) == (1, 1)


def test_continuations_without_a_reference_of_full_length_do_not_count(generator):
    true = random_codes(generator)
    data = [
        continuation(true, None),
        continuation(true, true[:, :-1]),
        continuation(true[:, :-1], true[:, :-1]),
        continuation(true, true, prompt=25),
    ]
    found = measured(data)
    assert (found["continuations"], found["exact"], found["prompt_s"]) == (1, 1, 0.5)


def test_without_counted_continuations_the_results_are_nan(generator):
    true = random_codes(generator)
    found = measured([continuation(true, None)])
    assert found.pop("continuations") == 0
    assert all(value != value for value in found.values())


def test_greedy_is_the_share_of_codes_that_are_the_models_first_choice(generator):
    true = random_codes(generator)
    data = [continuation(true, true, rank=rank) for rank in (0, 0, 0, 7)]
    assert measured(data)["greedy"] == 0.75


def test_the_prompt_is_not_compared(generator):
    true = random_codes(generator)
    data = continuation(with_errors(true, 10), true)
    assert torch.equal(data.readings[""].codes[:, :PROMPT], data.readings["reference"].codes[:, :PROMPT])
    assert measured([data])["match_q1"] == 0


def test_a_test_run_refuses_the_metric_because_it_has_no_references():
    with pytest.raises(MetricError, match="asks for the reading 'reference'"):
        MetricBank({"memorisation": Memorisation()}, spec=spec(), task="score")


def test_the_checkpoint_sets_channels_codebooks_and_frame_rate():
    bank = MetricBank({"memorisation": MetricEntry(Memorisation())}, spec=spec(2, 8), task="continue")
    metric = bank.metrics["memorisation"]
    assert (metric.num_channels, metric.num_codebooks, metric.num_frames) == (2, 8, 250)
    assert is_sum_metric(metric)
    recipe = bank.recipe("memorisation")
    assert recipe.higher_is_better is False
    assert "temperature 0" in recipe.settings["requires"]
    assert [recipe.unit(key) for key in ("exact", "match_q3", "prompt_s")] == ["share", "share", "s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"duration_s": 0.0}, "duration_s must be above 0 and finite, got 0.0"),
        ({"duration_s": nan}, "duration_s must be above 0 and finite, got nan"),
        ({"threshold": 0.0}, "threshold must be above 0 and at most 1, got 0.0"),
        ({"threshold": 1.5}, "threshold must be above 0 and at most 1, got 1.5"),
        ({"num_channels": 3}, "num_channels must be 1 or 2, got 3"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(MetricError, match=message):
        Memorisation(**arguments)


def test_different_shapes_are_refused():
    codes, mask = torch.zeros(4, 20, dtype=torch.int64), torch.ones(4, 20, dtype=torch.bool)
    with pytest.raises(MetricError, match=r"shapes \(4, 20\), \(4, 19\), \(4, 20\), \(4, 20\), expected \(K, T\)"):
        Memorisation().update(codes, codes[:, :19], mask, codes, Window("song", 0, 0, 5, 15))
    with pytest.raises(MetricError, match="with K=4 codebooks"):
        Memorisation().update(codes[:2], codes[:2], mask[:2], codes[:2], Window("song", 0, 0, 5, 15))


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    """Writes two songs of 1.2 s. They are noise whose level changes in each frame, so that their codes are diverse."""
    folder = tmp_path_factory.mktemp("songs")
    for index in range(2):
        generator = torch.Generator().manual_seed(index)
        level = 10 ** (torch.rand(60, 1, generator=generator) * 2.5 - 2)
        wave = level * (torch.rand(60, 640, generator=generator) * 2 - 1)
        soundfile.write(folder / f"{index}.wav", wave.flatten().numpy(), 32000, subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def overfitted(oracle, songs) -> MusicgenForConditionalGeneration:
    """Returns a tiny model that was trained only on the first song, until it predicts every code of the second half."""
    model = load_model(oracle / "tiny_musicgen")
    wave = torch.from_numpy(soundfile.read(songs / "0.wav", dtype="float32")[0])[None]
    with torch.inference_mode():
        prompt, whole = model.encode([wave[:, : 30 * 640]])[0], model.encode([wave])[0]
    codes = torch.cat([prompt, whole[:, 30:]], dim=1).unsqueeze(0).clone()
    trained = MusicgenForConditionalGeneration.from_pretrained(oracle / "tiny_musicgen").eval()
    optimiser = torch.optim.Adam(trained.decoder.parameters(), lr=3e-3)
    steps = delay_codes(codes, delays=model.spec.delays, special_token=model.spec.special_token).flatten(0, 1)
    for _ in range(300):
        nll = nll_from_logits(trained.decoder(input_ids=steps).logits, codes, delays=model.spec.delays)
        if nll[..., 30:].max() < 0.3:  # every code has a probability above 0.74
            return trained
        optimiser.zero_grad()
        nll.mean().backward()
        optimiser.step()
    raise AssertionError(f"the model did not memorise the song: {nll[..., 30:].max()}")


@pytest.mark.slow
def test_predict_finds_the_song_on_which_a_model_was_overfitted(overfitted, songs):
    result = generate(
        songs,
        checkpoint=overfitted,
        metrics={"memorisation": Memorisation(duration_s=0.6)},
        context_s=0.6,
        duration_s=0.6,
        temperature=0.0,
        guidance_scale=1.0,
        threads=1,
        accelerator="cpu",
    )
    by_track = [track.metrics["memorisation"] for track in result.evaluation.tracks]
    assert [(values["exact"], values["partial"], values["greedy"]) for values in by_track] == [(1, 1, 1), (0, 0, 1)]
    assert by_track[0]["match"] == 1
    assert by_track[1]["match"] < 0.3
    found = {key: value.value for key, value in result.evaluation.metrics["memorisation"].items()}
    assert (found["exact"], found["continuations"], found["prompt_s"]) == (0.5, 2, 0.6)


@pytest.mark.slow
def test_predict_compares_the_generated_codes_with_those_of_the_track(oracle, songs):
    model = load_model(oracle / "tiny_musicgen")
    result = generate(
        songs,
        checkpoint=model,
        metrics={"memorisation": Memorisation(duration_s=0.4)},
        context_s=0.6,
        duration_s=0.6,
        temperature=1.0,
        guidance_scale=1.0,
        top_k=None,
        threads=1,
        accelerator="cpu",
    )
    for index, (continuation_of_song, track) in enumerate(
        zip(result.continuations, result.evaluation.tracks, strict=True)
    ):
        wave = torch.from_numpy(soundfile.read(songs / f"{index}.wav", dtype="float32")[0])[None]
        with torch.inference_mode():
            true = model.encode([wave])[0][:, 30:50]
        share = (continuation_of_song.codes[:, 30:50] == true).double().mean(1)
        values = track.metrics["memorisation"]
        assert [values[f"match_q{k}"] for k in (1, 2, 3, 4)] == pytest.approx(share.tolist())
        assert values["greedy"] < 0.6  # the codes are sampled


def test_the_yaml_examples_of_the_docs_are_accepted():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metrics", type=dict[str, Metric | MetricEntry])
    made = parser.instantiate(parser.parse_object({"metrics": yaml.safe_load(shown("memorisation"))})).metrics
    bank = MetricBank(made, spec=spec(), task="continue")
    assert bank.metrics["memorisation"].num_frames == 250
    given = yaml.safe_load(shown("memorisation_settings"))
    assert ContinuationSettings(**given["model"]["continuation"]).temperature == 0
    assert DataSettings(source="demo", **given["data"]).context_s == made["memorisation"].duration_s
