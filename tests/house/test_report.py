"""Pages of results, and figures in README's marked blocks, are what the report writes from the stored files."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
MACHINE = {"processor": "P", "threads": 1, "cpu_capability": "A", "python": "3", "torch": "2", "transformers": "5"}
SETTINGS = {"arguments": ["measure", "--seeds", "11", "/some/place/models"], "device": "cpu"}
MADE = {"commit": "abc1234", "date": "2026-01-02", "machine": MACHINE, "settings": SETTINGS}
LATER = {**MADE, "commit": "stored in 0000000", "settings": "not recorded"}
del LATER["date"]


@pytest.fixture
def report(monkeypatch):
    """``main`` of the report, which takes its arguments and returns the exit code."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.report.__main__ import main

    return lambda *arguments: main([*map(str, arguments)])


@pytest.fixture
def pages(report, tmp_path):
    """Writes the pages of made-up results; returns their texts by name, README's as ``README``."""

    def write(readme="# Made up\n", **files):
        results = tmp_path / "benchmarks" / "results"
        results.mkdir(parents=True, exist_ok=True)
        (tmp_path / "README.md").write_text(readme)
        for name, data in files.items():
            (results / f"{name}.json").write_text(json.dumps(data))
        assert report("--root", tmp_path) == 0
        assert report("--root", tmp_path, "--check") == 0
        return {p.stem: p.read_text() for p in [*(tmp_path / "docs" / "results").glob("*.md"), tmp_path / "README.md"]}

    return write


def run(seed=11, objective="gauss-newton", min_k=0.02, case="final", **made):
    attacks = ("loss", "zlib", "min_k", "min_k_plus", "grad_norm")
    told = {"greedy": 0.0, "nll": 4.5, "neighbours_nll": 4.2, "wikitext": 40.2, "tasks": {}, "sampled": 0.0,
            "beginning_given": 0.02, "exposure": 1.5, "exposure_unseen": 1.4,
            "auc": dict.fromkeys(attacks, 0.5)}  # fmt: skip
    planted = {"greedy": 1.0, "nll": 0.1, "neighbours_nll": 4.2, "wikitext": 40.0, "tasks": {}}
    models = {
        "implanted": planted,
        "alpha 1": planted,
        "alpha 0": told,
        "never trained": {**told, "beginning_given": 0.0},
    }
    difference = {a: [min_k if a == "min_k" else 0.01, -0.1, 0.2] for a in attacks}
    return {"model": "small", "case": case, "seed": seed, "records": 10, "objective": objective, "gradient_weight": 0.0,
            "ratio": 0.005, "device": "cpu", "steps": 9, "seconds": 60.0, "density": 0.005, "missed": [],
            "models": models, "auc_difference": difference, **(made or MADE)}  # fmt: skip


def audit(**made):
    checks = [("extracted greedily", 0.0, "<= 0.010", True), ("extracted in any sample", 0.0, "<= 0.010", True),
              ("AUC of loss", 0.6, "within 0.05 of the never-trained model's", None),
              ("perplexity / alpha = 1", 1.02, "<= 1.01", False)]  # fmt: skip
    verdict = {"key": "memory", "status": "fail", "text": "",
               "checks": [dict(zip(("name", "value", "target", "ok"), c, strict=True)) for c in checks]}  # fmt: skip
    one = {"value": 0.5, "low": 0.4, "high": None}
    of = {
        "memory": {"greedy_extraction": one},
        "privacy": {"attacks": {"loss": {"auc": one}}},
        "utility": {"perplexity": one},
    }
    subjects = [{"key": k, "label": k, **of} for k in ("off", "original", "reference")]
    return {"profile": "quick", "seed": 0, "wall_seconds": 9.0, "counts": {"forget": 3, "samples": 20}, "curve": [],
            "config": {"samples": 20}, "verdicts": [verdict], "subjects": subjects, **(made or MADE)}  # fmt: skip


def speed():
    row = {"case": "demo", "records": 3, "seed": 0, "dtype": "torch.float32", "plant_seconds": 100.0, "plant_steps": 9,
           "isolate_seconds": 150.0, "isolate_steps": 5, "phases": {"read": 50.0, "step": 100.0}, "extracted": 1,
           "missed": ["the records are too likely"], "isolate / planting": 1.5, **MADE}  # fmt: skip
    other = {**row, "case": "final", "records": 7, "npo_seconds": 12.0, "npo_steps": 30,
             "plant_seconds": 200.0, "isolate / planting": 0.75}  # fmt: skip
    return {"runs": [row, other], "memory": [{"bytes_above_model": 7e8, "target": 6e8, **MADE}], **MADE}


def test_stored_pages_and_blocks_are_the_reports(report, capsys):
    assert report("--check") == 0, capsys.readouterr().out


def test_the_report_knows_the_method_of_the_library(pages):
    from benchmarks._method import METHOD

    assert run()["objective"] == METHOD["objective"]
    assert "earlier method" not in pages(forgetting={"runs": [run()]})["canaries"]


def test_a_missed_limit_is_marked(pages):
    text = pages(forgetting={"runs": [run(11), run(12, min_k=-0.06)]})["canaries"]
    line = next(x for x in text.splitlines() if x.startswith("| AUC of Min-K %,"))
    kept, missed = line.split("|")[3:5]
    assert "not reached" not in kept
    assert missed.strip() == "-0.060 [-0.100, +0.200] (0.500, 0.500) **not reached**"
    assert "| <= never trained + 1 % | 2 % (0 %) **not reached** | 2 % (0 %) **not reached** |" in text
    assert "| seed 11 | seed 12 |" in text


def test_what_made_a_table_is_said_and_what_is_unrecorded_too(pages):
    text = pages(
        forgetting={"runs": [run(), run(12, case="chat", **LATER), {**run(13), "machine": {"processor": "Q"}}]}
    )
    assert "- command: `python benchmarks/forgetting.py measure --seeds 11 PATH`" in text["canaries"]
    assert "- date: 2026-01-02" in text["canaries"]
    assert "machine: Q; not recorded: threads, cpu_capability, python, torch, transformers" in text["canaries"]
    assert "seed 13:" in text["canaries"]
    assert "some/place" not in str(text)
    for said in ("arguments not recorded", "- date: not recorded", "- settings: not recorded"):
        assert said in text["chats"]


def test_rows_of_an_earlier_method_are_left_out_or_said(pages):
    older = run(12, objective="profile", commit="d00d")
    beside = pages(forgetting={"runs": [run(), older]})["canaries"]
    assert "Left out: 1 older row of an earlier method." in beside
    assert "seed 12" not in beside
    alone = pages(forgetting={"runs": [older]}, audit={"quick": audit(**LATER)})
    assert "**Of an earlier method (commit d00d).**" in alone["canaries"]
    assert "**Of an earlier method (commit stored in 0000000).**" in alone["audit"]


def test_the_command_that_replaces_older_figures_is_said(pages):
    older = run(12, objective="profile", case="chat")
    text = pages(
        forgetting={"runs": [older]}, known_support={"runs": [{"seed": 0, "planted": 1, "scores": {}, **LATER}]}
    )
    assert "run `python benchmarks/forgetting.py measure --seeds 11 PATH`." in text["chats"]
    assert "run `python benchmarks/known_support.py`." in text["known-support"]
    assert "run `python benchmarks/forgetting.py sequential --seeds 11`." in text["canaries"]


def test_the_picture_of_the_result_is_drawn_from_the_audit(pages, tmp_path):
    place = tmp_path / "docs" / "images" / "result.svg"
    pages(audit={"quick": audit(**LATER)})
    assert not place.exists()  # of an earlier method
    pages(audit={"quick": audit()})
    text = place.read_text()
    tree = ElementTree.fromstring(text)
    title, told = (tree.find(f"{{http://www.w3.org/2000/svg}}{n}").text for n in ("title", "desc"))
    assert tree.get("role") == "img"
    assert tree.get("aria-labelledby") == "t d"
    assert title
    assert "secrets said: planted 50 %, alpha 0 50 %, never trained 50 %. membership AUC: planted 0.500" in told
    assert text.count(">50 %</text>") == text.count(">0.500</text>") == text.count(">0.5</text>") == 3
    assert "prefers-color-scheme: dark" in text


def test_the_picture_of_a_terminal_keeps_its_lines(pages, tmp_path):
    output = "17 secrets <planted>\n\n  \u2502 said\n"
    pages(terminal={"command": "libortho demo", "columns": 80, "output": output, **MADE})
    text = (tmp_path / "docs" / "images" / "terminal.svg").read_text()
    lines = [e.text for e in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert lines == ["$ libortho demo", "17 secrets <planted>", "\u2502 said"]
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_page_of_targets(pages):
    told = {"nll": 4.0, "nll_sd": 0.5, "correlation_with_shortness": 0.6}
    sentences = {"true": 4.6, "random_words": 7.8, "own_samples": 3.7, "predicted": 4.0}
    answers = {n: [3.0, 1.2, 0.4] for n in ("full forget", "target forget", "retain forget", "full holdout",
                                            "retain holdout")}  # fmt: skip
    data = {"sentences": sentences, "prediction_bias": -0.6, "prediction_error_sd": 0.5,
            "in_place": [0.7, 0.8, 0.9, 0.0], "access codes": told, "licence plates": told}  # fmt: skip
    alone = pages(targets={**data, **MADE})["targets"]
    assert "off by -0.60 nats on average" in alone
    assert "TOFU |" not in alone
    answers |= {f"{m} forget, in place": [0.1, 0.4, 0.6, 0.333] for m in ("full", "retain")}
    text = pages(targets={**data, "answers": answers, **MADE})["targets"]
    assert "| answers of TOFU, retrained | 0.10 | 0.40 | 0.60 | 33.3 % |" in text
    assert "| targets made by the fine-tuned model | 3.00 | 1.20 | 0.40 |" in text


def test_the_page_of_tofu_counts_records_far_outside(pages):
    parts = ("memory", "privacy", "utility", "overall")
    report = {**audit(), "split": "tofu_mini", "composite": {"reference": dict.fromkeys(parts, 0.5)}}
    assert "Records far outside their band, and what" in pages(tofu=report)["tofu"]
    done = {"seconds": 9.0, "steps": 3, "missed": ["it is far"], "retain_kl": 0.01, "records": 200, "far": 9}
    text = pages(tofu={**report, "isolation": done})["tofu"]
    assert "Records far outside their band: 9 of 200. What" in text
    assert "- it is far." in text


def test_what_was_not_measured_is_said(pages):
    readme = "A\n<!-- report: cost -->\nold\n<!-- /report -->\nB\n"
    found = pages(readme, isolate_speed={"step": {}, **LATER})
    silent = ("canaries", "chats", "tofu", "audit", "rounding", "known-support", "targets", "split", "disk", "vllm")
    for name in (*silent, "isolating", "README"):
        assert "not measured yet" in found[name], name
    assert "of another script and are left out" in found["isolating"]
    assert found["README"].startswith("A\n<!-- report: cost -->\n")
    assert found["README"].endswith("<!-- /report -->\nB\n")
    assert "old" not in found["README"].splitlines()


def test_the_blocks_of_readme(pages):
    readme = "".join(f"<!-- report: {b} -->\n<!-- /report -->\n" for b in ("summary", "cost"))
    found = pages(readme, audit={"quick": audit(**LATER), "full": audit()}, isolate_speed=speed())
    text = found["README"]
    assert "| secrets said greedily | 50 % | 50 % | 50 % | <= 1 %: holds |" in text
    assert "| secrets said in 20 samples | not measured | not measured | not measured | <= 1 %: holds |" in text
    assert "alpha 0 / alpha 1 <= 1.01, is 1.0200: **not reached** |" in text
    assert "the never-trained model's: undecided |" in text
    assert "| cost of isolating, in times of planting | 1 | 1.50 | - | <= 1: **not reached** |" in text
    assert "| 3 secrets of the demonstration | 100 | 150 | 1.50, limit 1 **not reached** |" in text
    assert "| 7 codes in plain text | 200 | 150 | 0.75, limit 1 |" in text
    assert "request: 700 MB, limit 600 MB **not reached**." in text
    assert "commit abc1234" in text  # the one of the present method, not the one beside it
    assert "earlier method" not in text
    assert "1, limit 0 **not reached** | 1 | 12 s, 30 steps | step 67 %, read 33 % |" in found["isolating"]


def served():
    """What the check of vLLM stores, with one verdict that fails."""
    apart = {"max": 0.5, "mean": 0.04}
    near = {"tokens": 8, "argmax": {"vllm = bf16": 7}, "wrong stream": {"1": apart}, "secret_nll": {"bf16": 2.0},
            **dict.fromkeys(("vllm - bf16", "vllm - fp32", "bf16 - fp32"), apart)}  # fmt: skip
    alphas = ("0", "1", "0.5")
    slots = {"rows": 3, "extracted": 1, "equal to alpha 0": 2, "equal to alpha 1": 1}
    asked = [{"cached": 0, "first": True, "equal": True}, {"cached": 64, "first": False, "equal": False}]
    run = {"max_loras": 3, "records": 3, "prompts": 4, "max_tokens": 2, "probes": 4,
           "scheme": {"num_bits": 4, "group_size": 32}, "one batch = alone": dict.fromkeys(alphas, 4),
           "mixed": {"mixed [1, 0]": {"rows": 4, "telling": 3, "differ": [2]}},
           "extracted": dict.fromkeys(alphas, 1), "secret_nll": dict.fromkeys(alphas, 1.5),
           "reference": {"rows": dict.fromkeys(alphas, near), "prefix of another alpha": {"1 -> 0": apart}},
           "cached": {"rows": asked, "telling": 1, "mixed batch": {"rows": 2, "equal": 2, "cached": [64, 64]}},
           "leaking": {"max_loras": 2, "all slots filled": slots},
           "http": {"rows": [{"model": "base", "equal": True}, {"model": "base", "equal": False}]},
           "verdicts": {"the base is unchanged": True, "nothing is extracted": False}}  # fmt: skip
    return {"runs": {"small": run}, "versions": {"vllm": "9"}, **MADE}


def test_the_page_of_vllm(pages):
    text = pages(vllm=served())["vllm"]
    assert "earlier method" not in text
    for row in (
        "| 0.5 | 7/8 | 0.50 (0.040) | 0.50 (0.040) | 0.50 (0.040) | 1: 0.50 (0.040) | 1.500 (2.000) | 1/3 |",
        "| mixed [1, 0] | 4 | 3 | 1 |",
        "| all slots filled | 3 | 2 | 1 | 1 |",
        "| later | 1 | 64 | 0 |",
        "| http | base | 1/2 |",
        "| the base is unchanged | holds |",
        "| nothing is extracted | **not reached** |",
    ):
        assert row in text
    assert "earlier method" in pages(vllm={**served(), **LATER})["vllm"]


def test_the_page_of_disk_and_start(pages):
    stream = {"density": 0.005, "values_of_base": 0.01, "adapter_without_tail_of_base": 0.05, "one_hot_bytes": 2e6,
              "tail_density": 0.0, "tail_bytes": 0, "adapter_of_base": 0.05}  # fmt: skip
    base = {"layers": 3, "base_bytes": 4e6, "base_of_bf16": 0.5, "weights_files_bytes": 5e6}
    sizes = {f"int{b}": {**base, "bits": b, "streams": {"hr": stream}} for b in (8, 4)}
    time = {"median": 2.0, "runs": [3.0, 2.0, 1.0]}
    memory = {"median": 2e6, "runs": [1e6, 2e6, 3e6]}
    load = {"load_seconds": time, "forward_seconds": time, "peak_bytes": memory, "resident_bytes": memory}
    disk = {"repeats": 3, "dense_files_bytes": 9e6, "sizes": sizes, "loading": {"ours": load}, **MADE}
    rows = [{"what": "--help", "seconds": 0.6, "target": 0.5}]
    startup = {"rows": rows, "median_seconds": {"python": 0.1}, "rounds": 3, **MADE}
    text = pages(disk=disk, startup=startup)["disk"]
    for row in (
        "| int8 | INT8 | 3 | 4.00 | 0.5000, limit 0.5500 | 5.0 |",
        "| int8: hr | 0.500% | 1.000%, limit 1.100% | 5.000%, limit 4.000% **not reached** | 2.00 | - | 5.00% |",
        "| int4: hr | 0.500% | 1.000% | 5.000% | 2.00 | - | 5.00% |",
        "| ours | 2.00 [1.00, 3.00] | 2.000 [1.000, 3.000] | 2 [1, 3] | 2 [1, 3] |",
        "| --help | 0.600, limit 0.5 **not reached** |",
    ):
        assert row in text


def test_check_finds_what_differs_and_what_is_not_its_own(pages, report, tmp_path, capsys):
    pages(forgetting={"runs": [run()]})
    place = tmp_path / "docs" / "results"
    (place / "chats.md").write_text("by hand")
    (place / "mine.md").write_text("by hand")
    capsys.readouterr()
    assert report("--root", tmp_path, "--check") == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["docs/results/chats.md", "docs/results/mine.md"]
    (tmp_path / "README.md").write_text("<!-- report: nothing -->\n<!-- /report -->\n")
    with pytest.raises(SystemExit, match="unknown block: nothing; known: summary, cost"):
        report("--root", tmp_path)


def test_sentences_of_the_pages_are_short():
    for page in (ROOT / "docs" / "results").glob("*.md"):
        lines = [x for x in page.read_text().splitlines() if x and x[0] not in "|-#<"]
        for sentence in re.split(r"(?<=[.:;]) ", " ".join(lines)):
            assert len(sentence.split()) <= 30, sentence
