import json

import pytest
import tokenizers

from zo_jax.models import tokenizer

TEMPLATE = (
    "{% for m in messages %}\n"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}"  # noqa: E501
    "<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": " Hi & <bye> "}]


def write(folder, **fields):
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="<e>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<e>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return tokenizer.from_folder(folder)


def test_folder_without_a_tokenizer(tmp_path):
    assert tokenizer.from_folder(tmp_path) is None


def test_tokens_and_texts(tmp_path):
    t = write(tmp_path)
    ids = t.encode("a b a <e>")
    assert ids.tolist() == [0, 1, 0, 2] and ids.dtype == "int32"
    assert t.decode(ids) == "a b a" and t.decode(ids, special=True) == "a b a <e>"


@pytest.mark.parametrize("eos", ["<e>", {"content": "<e>", "lstrip": False}])
@pytest.mark.parametrize("template", [TEMPLATE, [{"name": "default", "template": TEMPLATE}]])
def test_conversations(tmp_path, eos, template):
    t = write(tmp_path, eos_token=eos, chat_template=template)
    assert t.chat(MESSAGES) == "<user>Hi & <bye><e><assistant>"
    assert t.chat(MESSAGES, add_generation_prompt=False) == "<user>Hi & <bye><e>"
    with pytest.raises(ValueError, match="no role tool"):
        t.chat([{"role": "tool", "content": ""}])


def test_template_in_a_file_of_its_own(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages | tojson }}")
    t = write(tmp_path)
    assert t.chat(MESSAGES) == json.dumps(MESSAGES)


def test_templates_are_run_in_a_sandbox(tmp_path):
    t = write(tmp_path, chat_template="{{ ''.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="unsafe"):
        t.chat(MESSAGES)


def test_no_template(tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        write(tmp_path).chat(MESSAGES)


def test_written_tokenizer_is_the_same(tmp_path):
    t = write(tmp_path, eos_token="<e>", chat_template=TEMPLATE)
    (tmp_path / "out").mkdir()
    t.write(tmp_path / "out")
    again = tokenizer.from_folder(tmp_path / "out")
    assert again.chat(MESSAGES) == t.chat(MESSAGES)
    assert again.encode("a b <e>").tolist() == t.encode("a b <e>").tolist()


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        tokenizer.from_folder(tmp_path)
