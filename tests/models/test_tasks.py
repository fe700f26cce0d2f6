import itertools
import json

import pytest
from helpers.tiny import tiny_model, write_jsonl
from mlx_lm.models import gemma3
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset
from mlx_lm.utils import load_tokenizer

from d2c_mlx.models.examples import Example, ExampleSet, context_length
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import TaskRows, common_system, load_task
from d2c_mlx.utils.errors import TaskError


def completion(i):
    # Separators of lines that JSON allows within a text.
    return {"prompt": f"Question {i}:\u2028what\x85is it?", "completion": f"Answer {i}, ä."}


def chat(i):
    texts = ("You answer questions.", f"Question {i}?", f"Answer {i}.", "And another question?",
             f"Another answer {i}.")  # fmt: skip
    roles = ("system", "user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts)]}


def text(i):
    return {"text": f"The quick brown fox number {i}."}


FORMATS = [completion, chat, text]


def write(directory, probe, test):
    write_jsonl(directory / "probe.jsonl", probe)
    write_jsonl(directory / "test.jsonl", test)
    return directory


def refusal(directory):
    """The only line, without the directory."""
    caught = pytest.raises(TaskError, load_task, directory)
    (line,) = caught.value.problems
    return line.removeprefix(f"{directory}/")


def test_a_file_has_one_format(tmp_path):
    for i, (first, second) in enumerate(itertools.product(FORMATS, repeat=2)):
        directory = write(tmp_path / str(i), [first(0), second(1)], [first(2)])
        if first is second:
            loaded = load_task(directory)
            assert (loaded.probe, loaded.test) == ((first(0), first(1)), (first(2),))
        else:
            assert refusal(directory).startswith("probe.jsonl: mixes row formats")


@pytest.mark.parametrize(
    "row, field",
    [
        ({"prompt": "x"}, "prompt"),
        ({"question": "x", "answer": "y"}, "question"),
        ({}, "[]"),
        ({"prompt": "x", "completion": ""}, '"completion"'),
        ({"prompt": None, "completion": "x"}, '"prompt"'),
        ({"text": ["x"]}, '"text"'),
        ({"messages": []}, '"messages"'),
        ({"messages": ["x"]}, '"messages"'),
        ({"messages": [{"role": "assistant"}]}, '"messages"'),
        ({"messages": chat(0)["messages"][:-1]}, "role 'user', expected \"assistant\""),
        ([1], "list"),
    ],
)
def test_bad_rows_are_named_with_their_field(tmp_path, row, field):
    line = refusal(write(tmp_path / "t", [completion(0), row], [completion(1)]))
    assert line.startswith("probe.jsonl:2: ") and field in line


def test_what_is_between_rows_does_not_count(tmp_path):
    """Blank lines, ends of lines of Windows, no last one, a byte order mark."""
    directory = write(tmp_path / "t", [completion(0)], [completion(1)])
    first, second = (json.dumps(completion(i), ensure_ascii=False) for i in (2, 3))
    for content in (f"\n{first}\n  \n\n{second}\n\n", f"{first}\r\n{second}",
                    f"\ufeff{first}\n{second}\n"):  # fmt: skip
        (directory / "probe.jsonl").write_bytes(content.encode())
        assert load_task(directory).probe == (completion(2), completion(3))


def test_bad_files_and_shared_prompts_are_named(tmp_path):
    directory = write(tmp_path / "t", [completion(0)], [completion(2)])
    # A prompt of probe.jsonl, whatever its completion, by its line.
    shared = json.dumps({**completion(0), "completion": "another"})
    for content, begins in (
        ("\n \n", ": empty"),
        ('{"text": "\xe4"}\n', ": not UTF-8"),
        ('\n{"text": "a"}\n\n{oops\n', ":4: not JSON"),
        (f"\n\n{json.dumps(completion(1))}\n{shared}", ":4: "),
    ):
        (directory / "test.jsonl").write_bytes(content.encode("latin-1"))
        assert refusal(directory).startswith(f"test.jsonl{begins}")
    for row in FORMATS:
        line = refusal(write(directory, [row(0), row(1)], [row(2), row(1), row(0)]))
        assert line.startswith("test.jsonl:2: ")
        assert "(2 such rows)" in line and "probe.jsonl" in line
    # Rows of text are parted by their text.
    rows = [{**text(i), "prompt": "the same note"} for i in range(3)]
    assert len(load_task(write(directory, rows[:2], rows[2:])).probe) == 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Model(str(tiny_model(tmp_path_factory.mktemp("tiny") / "model")))


@pytest.mark.parametrize(
    "row, dataset, target",
    [
        (completion, lambda *x: CompletionsDataset(*x, "prompt", "completion", mask_prompt=True),
         "Answer 1, ä.<|im_end|>\n"),
        (chat, lambda *x: ChatDataset(*x, mask_prompt=True), "Another answer 1.<|im_end|>\n"),
        (text, TextDataset, "The quick brown fox number 1."),
    ],
)  # fmt: skip
def test_rows_are_encoded_as_mlx_lm_does(base, row, dataset, target):
    rows, tokenizer = [row(i) for i in range(3)], load_tokenizer(base.path)
    examples = base.encode("t", rows).examples
    pairs = map(dataset(rows, tokenizer).process, rows)
    assert examples == tuple(Example(tuple(tokens), offset) for tokens, offset in pairs)
    assert tokenizer.decode(examples[1].tokens[examples[1].offset :]).startswith(target)


@pytest.mark.parametrize(
    "row, beside",
    [
        (text, {"prompt": "half a pair"}),
        (text, {"id": 3}),
        (chat, {"text": "beside"}),
        (completion, {"text": "beside"}),
        (completion, {"messages": [{"role": "system", "content": "Be brief."}]}),
    ],
)
def test_keys_beside_those_of_a_format_change_nothing(base, row, beside):
    """As for mlx-lm: in the losses, in the prompts of answers, and in what a pack says."""
    plain = [row(i) for i in range(2)]
    rows = [{**x, **beside} for x in plain]
    assert base.encode("t", rows).examples == base.encode("t", plain).examples
    tasks = [TaskRows("t", tuple(x), ()) for x in (rows, plain)]
    assert common_system(tasks[:1]) == common_system(tasks[1:])


def test_rows_that_cannot_be_measured_are_refused(base, monkeypatch):
    row = {"prompt": "the fox " * 600, "completion": "x"}
    for rows, words in (
        ([row], "expected at most .* the model's context"),
        ([text(0), {"text": "<|im_end|>"}], "task t: row 2 has no target token"),
    ):
        pytest.raises(TaskError, base.encode, "t", rows).match(words)
    monkeypatch.setattr(base.tokenizer._tokenizer, "chat_template", None)
    assert base.encode("t", [text(0)]).n_targets > 0
    with pytest.raises(TaskError, match="task t: row 1: .*the model has no chat template"):
        base.encode("t", [completion(0)])


def test_the_context_is_the_model_s_or_that_of_its_text():
    # Models that take images too have it among the arguments of the text.
    nested = gemma3.ModelArgs("gemma3", {"max_position_embeddings": 64}, 300)
    assert context_length(nested) == 64
    for odd in ({}, {"text_config": None}, {"text_config": "x"}, {"max_position_embeddings": "x"}):
        assert context_length(odd) is None


def test_halves_have_two_rows_or_more():
    for n, sizes in ((1, [1]), (3, [3]), (4, [2, 2]), (5, [3, 2])):
        whole = ExampleSet("t", tuple(Example((1, 2, i), 1) for i in range(n)))
        cut = whole.halved()
        assert [len(part.examples) for part in cut.parts] == sizes
        assert sum((part.examples for part in cut.parts), ()) == whole.examples
        assert cut.digest == whole.digest and whole.parts == (whole,)
