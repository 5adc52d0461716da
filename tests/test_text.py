import shutil
import socket

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import ByteLevelBPETokenizer

from helpers.agents.embeddings import last_real_token, masked_mean
from helpers.features import SCHEMA
from helpers.files import DataError, read_vectors
from helpers.text import encode, item_text, load_encoder

TEXTS = {5: "toy story", 3: "a film about toys who fear a new rival in town", 9: "heat", 1: "golden eye crime comedy"}
WORDS = sorted({word for text in TEXTS.values() for word in text.split()})
SMALL = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An encoder as BERT is one, and a decoder as GPT-2: byte-level BPE, no padding token, a head for writing."""
    torch.manual_seed(0)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("bert", "gpt2")}
    (folders["bert"] / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    hf.BertModel(hf.BertConfig(**SMALL)).save_pretrained(folders["bert"])
    hf.BertTokenizerFast.from_pretrained(folders["bert"]).save_pretrained(folders["bert"])
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS.values(), vocab_size=300, special_tokens=["<|endoftext|>"])
    hf.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>",
                               padding_side="left").save_pretrained(folders["gpt2"])
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
                                     bos_token_id=0, eos_token_id=0)).save_pretrained(folders["gpt2"])
    return folders


@pytest.fixture(params=["bert", "gpt2"])
def encoder(request, folders):
    return load_encoder(folders[request.param])


def batches_of(texts, tokenizer, model, **options):
    """Return (texts, tokens with padding, real tokens) of each batch that is pooled."""
    shapes = []

    def pool(hidden, mask):
        shapes.append((*mask.shape, int(mask.sum())))
        return masked_mean(hidden, mask)

    encode(texts, tokenizer, model, pool, **options)
    return shapes


@pytest.mark.parametrize("known, expected", [
    ({}, ""), ({"title": "Heat", "release_year": 1995}, "Heat (1995)"), ({"release_year": 1995}, "(1995)"),
    ({"title": "Heat", "tagline": "  ", "overview": " A thief. "}, "Heat. A thief."),
    ({"title": "Heat", "tagline": "", "genres": ["Crime", "Drama"], "overview": "A thief"},
     "Heat. Crime, Drama. A thief"),
    *(({"title": "Heat", "overview": nothing}, "Heat") for nothing in (None, " no overview found ", "No Overview."))])
def test_what_is_unknown_leaves_no_trace_in_a_text(known, expected):
    assert item_text({**SCHEMA, **known}) == item_text(known) == expected


@pytest.mark.parametrize("pool", [masked_mean, last_real_token])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_vectors_are_those_of_the_model_given_each_text_alone(encoder, pool, batch_size, tmp_path):
    tokenizer, model = encoder
    vectors = encode(TEXTS, tokenizer, model, pool, batch_size=batch_size, path=tmp_path / "new" / "texts_bert.p")
    written = read_vectors(tmp_path / "new" / "texts_bert.p")
    assert list(vectors) == list(written) == list(TEXTS)
    for item_id, text in TEXTS.items():
        given = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**given).last_hidden_state
        assert vectors[item_id].dtype == np.float32 and np.array_equal(vectors[item_id], written[item_id])
        np.testing.assert_allclose(vectors[item_id], pool(hidden, given["attention_mask"])[0], rtol=0, atol=1e-5)
    assert all(np.abs(vectors[5] - vectors[other]).max() > 1e-2 for other in (3, 9, 1))


def test_an_empty_text_has_a_vector_and_no_texts_have_none(encoder):
    tokenizer, model = encoder
    ids = tokenizer("")["input_ids"] or [tokenizer.pad_token_id]  # GPT-2 has no tokens for it
    with torch.no_grad():
        expected = model(torch.tensor([ids])).last_hidden_state.mean(dim=1)[0]
    vectors = encode({1: "toy story", 2: ""}, tokenizer, model, masked_mean)
    np.testing.assert_allclose(vectors[2], expected, rtol=0, atol=1e-5)
    assert encode({}, tokenizer, model, masked_mean) == {}


def test_a_batch_is_of_similar_length_in_tokens_the_longest_first(folders):
    texts = dict(enumerate(["unknownandverylong", "toy " * 3, "anotherunknownword", "toy " * 3]))
    assert batches_of(texts, *load_encoder(folders["bert"]), batch_size=2) == [(2, 5, 10), (2, 3, 6)]  # no padding
    assert batches_of(texts, *load_encoder(folders["bert"])) == [(4, 5, 16)]


@pytest.mark.parametrize("config, n_read", [
    (hf.RobertaConfig(**SMALL), 30),  # the places 0 and 1 are not for tokens
    (hf.BertConfig(**SMALL), 32), (hf.XLNetConfig(vocab_size=60, d_model=8, n_layer=1, n_head=2, d_inner=8), 40)
], ids=lambda value: type(value).__name__)  # the last has no limit, and says −1
def test_a_text_is_cut_at_max_length_and_at_the_positions_a_model_has(folders, config, n_read):
    tokenizer, model = hf.BertTokenizerFast.from_pretrained(folders["bert"]), hf.AutoModel.from_config(config).eval()
    for max_length, expected in ((40, n_read), (8, 8)):
        assert batches_of({1: "toy story " * 50}, tokenizer, model, max_length=max_length) == [(1, expected, expected)]
    tokenizer.model_max_length = 6
    assert batches_of({1: "toy story " * 50}, tokenizer, model) == [(1, 6, 6)]


@pytest.mark.parametrize("kind, pattern, left, said", [
    ("bert", "model.safetensors", lambda content: None, "safetensors"),
    ("bert", "model.safetensors", lambda content: content[:1000], "folder"),
    ("bert", "config.json", lambda content: content.replace(b'layers": 2', b'layers": 3'), "16 such"),
    ("gpt2", "tokenizer*", lambda content: None, "no words")])
def test_a_folder_without_a_whole_encoder_gets_a_sentence(tmp_path, folders, kind, pattern, left, said):
    shutil.copytree(folders[kind], tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob(pattern):
        content = left(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_encoder(tmp_path)


def test_a_name_is_found_in_the_cache_of_the_hub_or_gets_a_sentence(folders, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for name in ("somebody/tiny-gpt2", "no/such/folder", "a name"):
        with pytest.raises(DataError, match=name):
            load_encoder(name)
    place = tmp_path / "models--somebody--tiny-gpt2"
    shutil.copytree(folders["gpt2"], place / "snapshots" / "0" / "")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0")
    tokenizer, model = load_encoder("somebody/tiny-gpt2")
    assert (tokenizer.pad_token, tokenizer.padding_side, model.config.model_type) == ("<|endoftext|>", "right", "gpt2")
