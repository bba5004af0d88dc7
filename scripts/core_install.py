"""Every command in an environment with the core dependencies only; called by ``scripts/test-core-install``.

Commands run in this one process, through the entry point, so that torch is imported once; the scripts that pip made
are each started for their --help.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from libortho import cli
from libortho.core.extras import MODULES

RECORDS = [{"prompt": f"PIN of {n}:", "completion": f" {c}."} for n, c in (("Ada Lum", 6311), ("Bo Tran", 4890))]


def tiny_model(directory: Path) -> Path:
    """A random model with one token for each byte."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).save_pretrained(directory)  # fmt: skip
    return directory


def run(*arguments: Any) -> tuple[int, str]:
    """Exit code and standard error of one command."""
    told = io.StringIO()
    sys.argv = ["libortho", *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = 1 if isinstance(stop.code, str) else int(stop.code or 0)
    return code, told.getvalue()


def main() -> None:
    """Run everything; an assertion tells what failed."""
    work = Path(sys.argv[1])
    installed = [m for names in MODULES.values() for m in names if importlib.util.find_spec(m)]
    assert not installed, f"this environment holds {installed}, which extras bring"
    model, out, base = tiny_model(work / "model"), work / "out", work / "base"
    forget, task = work / "forget.jsonl", work / "task.jsonl"
    forget.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    task.write_text(json.dumps({"context": "PIN of Ada:", "continuation": " 6311."}), encoding="utf-8")
    retain = work / "retain.txt"
    retain.write_text("The moon goes round the earth, and the earth goes round the sun.\n" * 3, encoding="utf-8")
    (work / "model.gguf").write_bytes(b"GGUF")
    streams = work / "streams"
    tuned, both = work / "tuned", work / "both"
    quick = ("--set", "epochs=1", "--ratio", "0.1", "--retain", retain)
    some = ("--forget", forget, "--set", "max_steps=1", "--ratio", "0.1")
    # what is run, and the extra that is named; None: it runs (3 where a criterion was missed)
    cases: list[tuple[tuple[Any, ...], str | None]] = [
        (("records", forget, "--prompt", "{prompt}", "--completion", "{completion}"), None),
        (("split", model, "--out", out), None),
        (("isolate", model, "--out", streams, *some, "--retain", retain, "--allow-unknown"), None),
        (("tune", model, "--out", tuned, "--data", forget, *quick, "--stream", "hr"), None),
        (("tune", model, "--out", work / "none", "--data", forget, "--epsilon", 8, "--delta", 0.1), "dp"),
        (("retune", model, "--old", tuned, "--out", work / "anew", "--data", forget, "--stream", "hr"), None),
        (("tune", tuned, "--out", both, "--data", forget, *quick, "--stream", "legal"), None),
        (("audit", both, "--streams", f"hr={forget}", "--streams", f"legal={forget}"), None),
        (("isolate", work / "model.gguf", "--out", work / "none", *some), "demo"),
        (("generate", out, "Hello", "--max-new-tokens", 2), None),
        (("inspect", out), None),
        (("eval", out, "--task-file", task), None),
        (("eval", out, "--tasks", "arc_easy"), "eval"),
        (("detach", out, "--out", base), None),
        (("generate", base, "Hello", "--max-new-tokens", 2, "--alpha", 0), None),
        (("verify", base), None),
        (("attach", base, out / "ortho/default", "--name", "again"), None),
        (("card", out), None),
        (("audit", streams, "--forget", forget), "audit"),
        (("serve", tuned), "serve"),
        (("serve-key", "payroll", "--stream", "hr=1", "--keys", work / "keys.toml"), None),
        (("encrypt", out / "ortho/default", "--out", work / "locked"), "vault"),
        (("decrypt", work / "locked", "--out", work / "opened"), "vault"),
        (("demo",), "demo"),
        (("kernels",), None),
    ]
    names = [c.name or c.callback.__name__ for c in cli.app.registered_commands]
    untried = set(names) - {arguments[0] for arguments, _ in cases}
    assert not untried, f"commands that this script does not run: {sorted(untried)}"
    for name in names:
        code, told = run(name, "--help")
        assert code == 0, (name, told)
    for arguments, wanted in cases:
        code, told = run(*arguments)
        shown = f"libortho {' '.join(map(str, arguments))}: exit code {code}\n{told}"
        if wanted is None:
            assert code == 0 or (code == 3 and arguments[0] in ("isolate", "tune", "retune", "audit")), shown
            continue
        lines = told.strip().splitlines()
        assert code == 2, shown
        assert len(lines) == 1, shown
        assert f"pip install 'libortho[{wanted}]'" in lines[0], shown
    scripts = Path(sys.executable).parent
    for name, expected in (("libortho", 0), ("libortho-lm-eval", 2)):
        path = shutil.which(name, path=str(scripts))
        assert path is not None, f"pip made no script {name}"
        done = subprocess.run([path, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == expected, (name, done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    assert "pip install 'libortho[eval]'" in done.stderr, done.stderr
    sys.stdout.write(f"{len(names)} commands without extras: as they should be\n")


main()
