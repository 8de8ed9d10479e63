"""The files open in the readers that people train with."""

import json
import subprocess
import sys
from pathlib import Path

from needed import needed

sys.path.insert(0, str(Path(__file__).parents[1]))
from tokenize_help import dialogues, model_path, oracle_ids, write_jsonl  # noqa: E402

from hpctrain.data import run  # noqa: E402
from hpctrain.data.prepare import Request, prepare, write_plan  # noqa: E402

MEGATRON = """
import json, sys, warnings
warnings.simplefilter("ignore")
from megatron.core.datasets.indexed_dataset import IndexedDataset
data = IndexedDataset(sys.argv[1])
print(json.dumps([[int(token) for token in data[index]] for index in range(len(data))]))
print(json.dumps([data.document_indices.tolist(), data.sequence_lengths.tolist()]))
"""


def test_megatron_core_reads_what_we_write(tmp_path):
    """Needs megatron-core, and so torch: `tools/test` installs both (the extra `readers`)."""
    if sys.version_info >= (3, 10):
        needed("torch")  # without it this is not the environment of tools/test
    else:
        needed("megatron.core")

    import sentencepiece

    texts = dialogues(40)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    plan = prepare(Request((str(data),), model_path("bpe_identity"), str(tmp_path / "out"), 3)).plan
    write_plan(plan)
    run.run_here(plan, 1, False, False, lambda *numbers: None)
    done = subprocess.run(
        [sys.executable, "-c", MEGATRON, str(tmp_path / "out_text_document")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tokens, (doc_idx, lengths) = map(json.loads, done.stdout.splitlines()[-2:])
    sp = sentencepiece.SentencePieceProcessor(model_file=model_path("bpe_identity"))

    assert tokens == [oracle_ids(sp, text) for text in texts]
    assert doc_idx == list(range(len(texts) + 1)) and lengths == list(map(len, tokens))
