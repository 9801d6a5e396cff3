"""What README.md says, held against the repository: commands parse, files exist, figures are those of the results."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import convert_weights
import evaluate
import generate
import serve
import train
from data import prepare
from data.conditions import load_table
from data.evaluation.suite import PARTS
from llama.arguments import parse
from llama.config import PRESETS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")
COMMANDS = [line.split("  #")[0].strip() for line in SHELL.splitlines() if line.strip()]
REQUIREMENTS = (ROOT / "requirements.txt").read_text().splitlines()
TARGETS = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert words[1] in TARGETS
        return
    if words[-1].startswith("runs/"):
        recipe = (ROOT / words[-1]).read_text()
        assert all(f"{name}=${{{name}:-" in recipe for name in (word.partition("=")[0] for word in words[:-1]))
        return
    if words[:2] == ["pip", "install"]:
        assert all(any(line.startswith(f"{name}==") for line in REQUIREMENTS) for name in words[2:])
        return
    if words[:3] == ["python", "-m", "data.prepare"]:
        arguments, _ = prepare.COMMANDS[words[3]]
        arguments(words[4:])
        return
    script = next(i for i, w in enumerate(words) if w.endswith(".py"))
    assert words[0] in ("python", "torchrun")
    assert (ROOT / words[script]).exists()
    flags = words[script + 1 :]
    if words[script] == "train.py":
        parse(flags, {})
    elif words[script] == "generate.py":
        generate.parse(flags)
    elif words[script] == "evaluate.py":
        evaluate.parse(flags)
    elif words[script] == "serve.py":
        serve.parse(flags)
    else:
        convert_weights.parse(flags)


@pytest.mark.parametrize("command", [convert_weights, evaluate, generate, serve, train])
def test_help_is_printed(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse fills in help texts only when it prints them, so a lone % would show nowhere else."""
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_presets_are_trained_at_a_rate_that_learns() -> None:
    """5e-5 for 60 steps of `tiny` on plain text ends at a held-out loss of 7.26, 4e-3 at 4.43 (2026-11-26)."""
    trained = [parse(shlex.split(c)[2:], {}) for c in COMMANDS if c.startswith("python train.py --model")]
    rates = [args.learning_rate for args in trained if args.model_name_or_path in PRESETS]
    assert rates
    assert min(rates) >= 1e-3


def test_python_snippet_compiles() -> None:
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        compile(snippet, "README.md", "exec")


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:bench|data|docs|kernels|llama|runs|tests|web)/[\w./-]*)`", README))
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), name


def test_map_names_every_script_and_folder() -> None:
    tracked = [p for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in ("out", "__pycache__")]
    for path in tracked:
        if (path.is_dir() and any(path.rglob("*.py"))) or path.suffix == ".py" or path.name in ("runs", "docs"):
            assert path.name in README.split("## What is where")[1].split("##")[0], path.name


def result(name: str) -> list[dict[str, object]]:
    return json.loads((ROOT / "bench/results" / name).read_text())["results"]


@pytest.mark.parametrize("shape", ["15M", "110M", "1.1B"])
def test_decoding_figures_are_measured(shape: str) -> None:
    line = next(line for line in README.splitlines() if line.startswith(f"| decoding, {shape} "))
    measured = [r for r in result("decode_cpu.json") if (r["engine"], r["shape"]) == ("ours", shape.lower())]
    kinds = " / ".join({"float32": "fp32", "bfloat16": "bf16"}.get(str(r["kind"]), str(r["kind"])) for r in measured)
    assert line.startswith(f"| decoding, {shape} {kinds} |")
    speeds = " / ".join(f"{r['decode_tokens_per_s']:.0f}" for r in measured)
    ratios = [" / ".join(f"{r[f'decode_ratio_to_{p}']:.2f}x" for r in measured) for p in ("transformers", "llama.cpp")]
    assert f"| {speeds} tok/s = {ratios[0]} transformers, {ratios[1]} llama.cpp |" in line


def test_batches_are_measured() -> None:
    rows = [r for r in result("batch_cpu.json") if r["shape"] == "15m" and r["dtype"] in ("float32", "bfloat16")]
    alone, theirs = (" / ".join(f"{r[key]:.2f}x" for r in rows) for key in ("times_alone", "times_transformers"))
    assert f"| {alone} one at a time, {theirs} transformers' batches |" in README


def test_scoring_is_measured() -> None:
    r = next(r for r in result("evaluate_cpu.json") if r["shape"] == "110m")
    ratios = " / ".join(f"{r[f'{kind}_to_prefill']:.2f}x" for kind in ("documents", "letters", "texts"))
    assert f"| {ratios} the model's own batched prefill |" in README


def test_every_part_of_an_evaluation_is_listed() -> None:
    listed = README.split("| part | what |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in listed.splitlines()[2:]))) == PARTS.keys()


def test_streams_are_measured() -> None:
    r = next(r for r in result("engine_cpu.json") if r["shape"] == "15m")
    ratios = (r[f"{way}, tokens_per_own_s"] for way in ("many / one", "steps of many / steps of one"))
    both, steps = (ratio["median"] for ratio in ratios)  # type: ignore[index]
    many = r["many"]
    first = f"first token in {many['first_token_ms_p50']:.0f} ms, p95 {many['first_token_ms_p95']:.0f} ms"  # type: ignore[index]
    assert f"16 streams, 15M fp32, one core | {both:.2f}x one" in README
    assert f"(steps alone {steps:.2f}x), {first} |" in README


def test_load_over_http_is_measured() -> None:
    table: Any = next(r for r in result("serve_cpu.json") if r["shape"] == "15m")["rows"]
    rows = [r for r in table if r["clients"] == 16]
    assert [r["server"] for r in rows] == ["ours", "llama.cpp", "llama-cpp-python"]
    tokens = " / ".join(f"{r['tokens_per_own_s']:.0f}" for r in rows)
    first = " / ".join(f"{r['first_ms_p95'] / 1e3:.1f}" for r in rows)
    assert f"| {tokens} tokens a second of the server's processor time, first text within {first} s (p95) |" in README


def test_the_soak_is_measured() -> None:
    soak: Any = json.loads((ROOT / "bench/results/soak_cpu.json").read_text())["results"]
    assert soak["seconds"] >= 600
    assert soak["rows_taken_at_the_end"] == soak["failed"] == soak["differ"] == 0
    assert f"memory {100 * soak['drift']:+.2f} %, every row free, {soak['finished']:,} answers" in README


def test_what_rounding_costs_is_measured() -> None:
    rows = {(r["weights"], r["rounding"], r["group"]): r for r in result("quantised_cpu.json")}
    figures = [
        rows[key]["perplexity_ratio"]
        for key in (("int8", "nearest", 0), ("int4", "naive", 64), ("int4", "compensated", 64))
    ]
    assert "perplexity " + " / ".join(f"x{f:.4f}" for f in figures) in README


def test_grounded_answers_are_measured() -> None:
    results = json.loads((ROOT / "bench/results/grounding_cpu.json").read_text())["results"]
    held_out = results["in_the_database"]["held_out"]
    elsewhere = results["questions from elsewhere, by search alone"]
    honest = [*elsewhere.values(), results["condition left out of the database"]["no_entry_by_search"]]
    shares = " / ".join(f"{100 * h['share']:.1f} %" for h in honest)
    wrongly = 100 * (1 - held_out["a_row_is_found"]["share"])
    assert f"| {shares}; to {wrongly:.1f} % of held-out questions wrongly |" in README
    ways = [held_out[w] for w in ("grounded", "same_model_without_rows", "template_of_the_first_row")]
    right = " / ".join(f"{100 * w['names_the_right_condition']['share']:.1f} %" for w in ways)
    assert f"| {right} |" in README
    assert f"| {100 * ways[0]['citation_precision']['share']:.1f} % (the template's: 100 %)" in README


def test_an_int8_cache_is_measured() -> None:
    rows = result("cache_cpu.json")
    ratios = " / ".join(f"{r['decode_ratio']:.2f}x" for r in rows)
    assert "behind " + " / ".join(f"{r['positions']:,}" for r in rows) + f" positions | {ratios} the full" in README
    sizes = [rows[0][name]["bytes_per_token"] for name in ("int8", "full")]  # type: ignore[index]
    assert "{:,} bytes a token instead of {:,} |".format(*sizes) in README
    quality = next(r for r in result("quantised_cpu.json") if r["rounding"] == "int8 cache")
    assert f"perplexity x{quality['perplexity_ratio']:.4f} the full cache's" in README
    c = PRESETS["7b"]
    numbers = 2 * c.n_layers * c.n_kv_heads
    of_7b = [numbers * (c.head_dim + 4), numbers * c.head_dim * 2, numbers * c.head_dim * 4]
    text = " ".join(README.split())
    assert "{:,} bytes instead of {:,} in 16 bits or, on a CPU, {:,} in fp32".format(*of_7b) in text


def test_what_guessing_ahead_wins_is_measured() -> None:
    document = json.loads((ROOT / "bench/results/speculative_cpu.json").read_text())
    line = next(line for line in README.splitlines() if line.startswith("| `--speculate lookup`, 110M bf16"))
    by_text = next(r for r in document["results"] if (r["shape"], r["dtype"]) == ("110m", "bfloat16"))["lookup"]
    ratios = [by_text[name]["ratio"] for name in ("copies the prompt", "half of it", "never repeats")]
    assert " / ".join(f"{r:.2f}x" for r in ratios) + " plain decoding" in line
    idle = [r["lookup"]["never repeats"]["ratio"] for r in document["results"]]
    idle.append(document["trained"]["asked once"]["ratio"])
    assert f"loses {1 - max(idle):.0%} to {1 - min(idle):.0%}".replace("%", "", 1).replace("%", " %") in README


@pytest.mark.parametrize("shape", ["15m", "tiny"])
def test_training_figures_are_measured(shape: str) -> None:
    name = {"15m": "15M"}.get(shape, shape)
    line = next(line for line in README.splitlines() if line.startswith(f"| training step, {name} fp32"))
    r = next(r for r in result("train_cpu.json") if (r["shape"], r["dtype"]) == (shape, "float32"))
    assert f"{r['ours padded']['speedup']:.2f}x / {r['ours packed']['speedup']:.2f}x transformers" in line  # type: ignore[index]


def test_default_run_is_measured() -> None:
    assert f"from a table of {len(load_table().conditions)} conditions" in README
    r = json.loads((ROOT / "bench/results/default_cpu.json").read_text())["results"]
    assert f"{r['wall_seconds']:.0f} s, {r['tokens_per_s']:,} tokens/s" in README
    for title, shares in r["named_right"].items():
        figures = (shares["model"], shares["ranking_by_symptoms"], shares["ranking_by_words"])
        assert re.search(r"^ +" + " +".join(f"{f:.1%}" for f in figures) + f"   {title}$", README, re.M)
    assert f"{r['named_right']['unseen sentences and sets of symptoms']['model']:.1%}".replace("%", " %") in README


def test_moments_and_ranks_are_measured() -> None:
    moments = json.loads((ROOT / "bench/results/moments_cpu.json").read_text())["results"]
    assert "held-out loss " + " / ".join(f"{r['held_out_loss']:.3f}" for r in moments.values()) in README
    ranks = json.loads((ROOT / "bench/results/ranks_cpu.json").read_text())["results"]
    assert f"| {ranks['efficiency']:.0%}".replace("%", " %") + " of twice one rank's speed |" in README


def test_what_saving_costs_is_measured() -> None:
    saving = json.loads((ROOT / "bench/results/saving_cpu.json").read_text())["results"]
    shares = [saving[f"train_saves_in_{where}"]["stall_percent"] for where in ("background", "foreground")]
    assert f"{shares[0]:.1f} % in the background, {shares[1]:.1f} % in the foreground" in README


def test_what_triage_finds_is_measured() -> None:
    r = json.loads((ROOT / "bench/results/triage_cpu.json").read_text())["results"]
    vignettes, everyday = r["vignettes"], r["everyday_language"]
    for rows in (
        (vignettes, vignettes["keywords"]),
        (everyday, {name: figures["keywords"] for name, figures in everyday.items()}),
    ):
        ours, words = (
            f"{x['emergency_recall']['hits']} of {x['emergency_recall']['n']} emergencies, "
            f"{x['false_alarms']['hits']} of {x['false_alarms']['n']} false alarms"
            for x in rows
        )
        assert f"| {ours}; plain keywords {words} |" in README
    low, high = vignettes["emergency_recall"]["interval"]
    assert f"95 % interval of the recall {low:.2f} to {high:.2f}".replace(" 0.", " .") in README
    assert f"flags {r['chatdoctor5k_flagged']['all']['share'] * 100:.1f} % of ChatDoctor's 5k questions" in README
    assert f"takes {r['speed']['median_ms']:.1f} ms a question" in README
    assert f"{sum(r['rules'].values())} rules in plain words" in README


def test_what_the_database_finds_is_measured() -> None:
    measured = json.loads((ROOT / "bench/results/retrieval_cpu.json").read_text())["results"]["format_dataset"]

    def shares(figures: dict[str, list[float]]) -> str:
        return " / ".join(f"{figures[f'top_{k}'][0]:.3f}" for k in (1, 5, 10))

    triples, asked = measured["triples"], measured["questions"]["held_out"]
    assert f"{shares(triples['by_symptoms'])} (IDF floor {shares(triples['floor: IDF of names'])})" in README
    baselines = f"(BM25 {shares(asked['BM25, plain words'])}, stemmed {shares(asked['BM25, stemmed'])})"
    assert f"| its search, {asked['search']['n']:,} held-out" in README
    assert f"| {shares(asked['search'])} {baselines} |" in README
    times = (measured["latency_ms"][kind] for kind in ("disease", "passage"))
    p99 = list(zip(*((t["processor_p99"], t["clock_p99"]) for t in times), strict=True))
    assert "{:.1f} / {:.1f} ms of a core, {:.1f} / {:.1f} ms by the clock".format(*p99[0], *p99[1]) in README


def test_what_generation_costs_is_measured() -> None:
    r = json.loads((ROOT / "bench/results/generate_cpu.json").read_text())["results"]
    many, killed, five_k = r["side_by_side"], r["killed"], r["chatdoctor5k"]
    assert many["requests"] == killed["prompts"]
    assert killed["same_file"]
    took = f"{many['seconds']:.1f} s, {many['share_of_ideal']:.0%}".replace("%", " %")
    assert (
        f"{many['requests']:,} replies of {many['reply_seconds']} s, {many['concurrency']} at a time | {took}" in README
    )
    assert f"killed {killed['kills']} times" in README
    near = five_k["dialogue"]
    assert f"| {near['near_duplicates']} of {five_k['dialogues']:,}, in {near['seconds']:.1f} s |" in README


def test_cleaning_is_measured() -> None:
    r = json.loads((ROOT / "bench/results/clean_cpu.json").read_text())["results"]
    halves = " / ".join(f"{100 * r[half]['recall']:.1f} %" for half in ("seen", "held out"))
    assert f"| {halves} found" in README
    assert f"{r['medquad']['words_damaged']} of {r['medquad']['words']:,} words" in README
    assert not r["clinical_words"]["changed"]
    assert f"{r['medquad']['mb_per_s']:.1f} MB/s" in README


def test_rows_of_the_table_name_their_own_bench_once() -> None:
    """A row that says "same" stands below the one whose command made it, and no figure stands there twice."""
    table = README.split("| what | measured |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table]
    assert len({row[1] for row in rows}) == len(rows)
    for above, row in pairwise(rows):
        if row[2] == "same":
            assert row[0].split()[0] in (above[0].split()[0], "its"), row


def test_what_an_h200_measured() -> None:
    training = json.loads((ROOT / "bench/results/train_nvidia_h200.json").read_text())["results"]
    ours, liger = (
        training[f"7b {w}"]
        for w in ("adamw_split, packed, nothing recomputed", "liger, packed, every block recomputed")
    )
    figures = f"{ours['real_tokens_per_s']:,.0f} tokens/s, {100 * ours['mfu']:.1f} % MFU"
    assert (
        f"{figures}, {ours['peak_memory_bytes'] / 2**30:.1f} GiB ({ours['planned_bytes'] / 2**30:.1f} planned)"
        in README
    )
    assert f"{ours['real_tokens_per_s'] / liger['real_tokens_per_s']:.2f}x transformers with Liger's kernels" in README
    decoding = json.loads((ROOT / "bench/results/decode_nvidia_h200.json").read_text())["results"]
    alone = [decoding[f"7b {kind}, alone"] for kind in ("bf16", "int8", "int4")]
    speeds = " / ".join(f"{line['decode_tokens_per_s']:.0f}" for line in alone)
    shares = " / ".join(f"{100 * line['share']:.0f} %" for line in alone)
    assert f"| {speeds} tok/s in " in README
    assert f", {shares} of the memory's speed |" in README
    rows = {r["name"]: r["implementations"] for r in result("kernels_nvidia_h200.json")}
    for step in ("forward", "backward"):
        lengths = ("8 x 2,048", "4 x 4,096", "2 x 8,192", "1 x 16,384")
        found = [rows[f"attention {step}, {n}, 16 heads of 128"] for n in lengths]
        said = " / ".join(f"{f['ours']['per_second'] / 1e12:.0f}" for f in found) + " TFLOP/s = "
        peers = [
            " / ".join(f"{f['ours']['per_second'] / f[peer]['per_second']:.2f}x" for f in found) + f" {name}"
            for peer, name in (("sdpa_flash", "FlashAttention-2"), ("cudnn", "cuDNN"))
        ]
        assert said + ", ".join(peers) + " |" in README
