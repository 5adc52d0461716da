import json
import shutil
import urllib.error
import urllib.request
from functools import partial

import numpy as np
import pytest
import torch
from filelock import FileLock
from huggingface_hub import constants as hub
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    T5Model,
    XLNetConfig,
)

import helpers.text
from helpers.features import SCHEMA
from helpers.files import DataError, read_vectors
from helpers.text import encode, item_text, load_encoder

TEXTS = {5: "toy story", 3: "a film about toys who fear a new rival in town", 9: "heat", 1: "golden eye crime comedy"}
WORDS = sorted({word for text in TEXTS.values() for word in text.split()})


def film(**known):
    return {**SCHEMA, **known}


def masked_mean(hidden, mask):
    mask = mask.unsqueeze(2)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def last_real_token(hidden, mask):
    return hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1]


def plain_mean(hidden, mask):
    return hidden.mean(dim=1)


def last_column(hidden, mask):
    return hidden[:, -1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=32)
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_encoder(folder)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A decoder as GPT-2 is one: byte-level BPE, no padding token, and weights saved with a head for writing."""
    folder = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS.values(), vocab_size=300, special_tokens=["<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=48, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
                        bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(gpt2_folder):
    return load_encoder(gpt2_folder)


@pytest.fixture
def texts_seen(encoder):
    """Return a list that gets the number of texts of each batch the encoder sees."""
    seen = []
    hook = encoder[1].register_forward_pre_hook(lambda _, __, given: seen.append(len(given["input_ids"])),
                                                with_kwargs=True)
    yield seen
    hook.remove()


def copied(raw, folder, **changed):
    return raw({path.name: path.read_bytes() for path in folder.iterdir()} | changed)


def test_text_has_title_year_genres_tagline_and_overview():
    info = film(title="Heat", release_year=1995, genres=["Crime", "Drama"], tagline="A Los Angeles crime saga",
                overview="A thief plans a last job")
    assert item_text(info) == "Heat (1995). Crime, Drama. A Los Angeles crime saga. A thief plans a last job"


@pytest.mark.parametrize("known, expected", [
    ({"title": "Heat"}, "Heat"),
    ({"title": "Heat", "release_year": 1995}, "Heat (1995)"),
    ({"title": "Heat", "genres": ["Crime"]}, "Heat. Crime"),
    ({"title": "Heat", "tagline": "  ", "overview": " A thief. "}, "Heat. A thief."),
    ({"title": "Heat", "tagline": "", "genres": ["Crime"], "overview": "A thief"}, "Heat. Crime. A thief"),
])
def test_missing_parts_leave_no_trace(known, expected):
    assert item_text(film(**known)) == expected


@pytest.mark.parametrize("nothing", [None, "", "  ", "No overview found.", " no overview found ", "No Overview"])
def test_an_overview_that_says_there_is_none_is_none(nothing):
    info = film(title="Heat", release_year=1995, genres=["Crime"], overview=nothing)
    assert item_text(info) == "Heat (1995). Crime"


def test_a_tagline_that_ends_in_a_full_stop_gets_no_second_one():
    assert item_text(film(title="Heat", tagline="A saga.", overview="A thief.")) == "Heat. A saga. A thief."


@pytest.mark.parametrize("info, expected", [
    ({"title": "Rain is expected"}, "Rain is expected"), ({"overview": "A thief"}, "A thief"), ({}, ""),
    (film(genres=["Crime"]), "Crime"), (film(release_year=1995), "(1995)"),
])
def test_a_record_may_lack_any_field(info, expected):
    assert item_text(info) == expected


def test_encoder_comes_in_evaluation_mode(encoder):
    assert not encoder[1].training


def test_words_of_the_vocabulary_are_known(encoder):
    tokens = encoder[0]("toy heat [PAD]")["input_ids"]
    assert encoder[0].unk_token_id not in tokens and len(tokens) == 5


@pytest.mark.parametrize("pool", [masked_mean, last_real_token])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_vector_is_the_same_alone_and_padded_in_a_batch(kind, pool, request):
    pair = request.getfixturevalue(kind)
    together = encode(TEXTS, *pair, pool)
    for item_id, text in TEXTS.items():
        alone = encode({item_id: text}, *pair, pool)[item_id]
        np.testing.assert_allclose(together[item_id], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, fault", [("encoder", plain_mean), ("decoder", plain_mean), ("decoder", last_column)])
def test_pooling_the_padding_would_be_noticed(kind, fault, request):
    pair = request.getfixturevalue(kind)
    together = encode(TEXTS, *pair, fault)
    alone = encode({9: TEXTS[9]}, *pair, fault)[9]
    assert np.abs(together[9] - alone).max() > 1e-2


def test_vectors_are_those_of_the_model_given_the_text_alone(encoder, decoder):
    for tokenizer, model in (encoder, decoder):
        vectors = encode(TEXTS, tokenizer, model, last_real_token)
        for item_id, text in TEXTS.items():
            with torch.no_grad():
                expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
            np.testing.assert_allclose(vectors[item_id], expected, rtol=0, atol=1e-5)


def test_a_decoder_pads_on_the_right_with_its_end_of_text(decoder):
    tokenizer, _ = decoder
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|endoftext|>", "right")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_empty_text_has_a_vector_too(kind, request):
    vectors = encode({1: "toy story", 2: ""}, *request.getfixturevalue(kind), masked_mean)
    assert all(np.isfinite(vector).all() for vector in vectors.values())


def test_a_batch_is_of_similar_length_in_tokens(encoder):
    shapes = []

    def pool(hidden, mask):
        shapes.append((*mask.shape, int(mask.sum())))
        return masked_mean(hidden, mask)

    texts = dict(enumerate(["toy " * 3, "unknownandverylong", "toy " * 3, "anotherunknownword"]))
    encode(texts, *encoder, pool, batch_size=2)
    assert shapes == [(2, 5, 10), (2, 3, 6)]  # nothing is padding


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_vectors_keep_the_order_and_the_ids_of_the_texts(encoder, batch_size):
    vectors = encode(TEXTS, *encoder, masked_mean, batch_size=batch_size)
    assert list(vectors) == [5, 3, 9, 1]
    whole = encode(TEXTS, *encoder, masked_mean)
    for item_id, vector in vectors.items():
        assert vector.dtype == np.float32 and vector.shape == (16,)
        np.testing.assert_allclose(vector, whole[item_id], rtol=0, atol=1e-5)


def test_different_texts_have_different_vectors(encoder):
    vectors = list(encode(TEXTS, *encoder, masked_mean).values())
    assert all(np.abs(a - b).max() > 1e-2 for i, a in enumerate(vectors) for b in vectors[:i])


def test_long_text_is_cut_at_max_length(encoder):
    lengths = []

    def pool(hidden, mask):
        lengths.append(hidden.shape[1])
        return masked_mean(hidden, mask)

    encode({1: "toy " * 100}, *encoder, pool, max_length=8)
    assert lengths == [8]


@pytest.mark.parametrize("kind, n_positions", [("encoder", 32), ("decoder", 48)])
def test_long_text_is_cut_at_the_positions_the_model_has(kind, n_positions, request):
    lengths = []

    def pool(hidden, mask):
        lengths.append(hidden.shape[1])
        return masked_mean(hidden, mask)

    encode({1: "toy story " * 100}, *request.getfixturevalue(kind), pool)
    assert lengths == [n_positions]


SMALL = dict(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
             max_position_embeddings=20)


@pytest.mark.parametrize("config, n_read", [
    (RobertaConfig(**SMALL), 18), (MPNetConfig(**SMALL), 18),  # the places 0 and 1 are not for tokens
    (BertConfig(**SMALL), 20),
    (GPT2Config(vocab_size=60, n_positions=20, n_embd=8, n_layer=1, n_head=2), 20),
    (XLNetConfig(vocab_size=60, d_model=8, n_layer=1, n_head=2, d_inner=8), 24)  # has no limit, and says −1
], ids=lambda value: type(value).__name__)
def test_no_more_tokens_are_read_than_any_model_has_positions_for(folder, config, n_read):
    tokenizer, model = BertTokenizerFast.from_pretrained(folder), AutoModel.from_config(config).eval()
    lengths = []

    def pool(hidden, mask):
        lengths.append(mask.shape[1])
        return masked_mean(hidden, mask)

    encode({1: "toy story " * 50}, tokenizer, model, pool, max_length=24)
    assert lengths == [n_read]


def test_no_texts_give_no_vectors(encoder, tmp_path):
    assert encode({}, *encoder, masked_mean) == {}
    assert encode({}, *encoder, masked_mean, path=tmp_path / "texts_bert.p") == {}


# --- resuming

def killed_after(n_batches):
    """Return a pooling that is interrupted after n batches; it is the masked mean otherwise, and for the recipe."""
    calls = iter(range(n_batches + 1))  # the first call is the recipe's

    def pool(hidden, mask):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return masked_mean(hidden, mask)
    return pool


def begin(encoder, path, n_batches=2, **options):
    with pytest.raises(KeyboardInterrupt):
        encode(TEXTS, *encoder, killed_after(n_batches), batch_size=1, path=path, **options)
    return path.with_name(".texts_bert.p.journal")


def test_vectors_are_written_and_nothing_else_is_left(encoder, tmp_path):
    path = tmp_path / "new" / "texts_bert.p"
    vectors = encode(TEXTS, *encoder, masked_mean, path=path)
    written = read_vectors(path)
    assert list(written) == list(vectors) == list(TEXTS) and [*path.parent.iterdir()] == [path]
    assert all(np.array_equal(written[item_id], vector) for item_id, vector in vectors.items())


def test_a_killed_run_goes_on_where_it_was(encoder, tmp_path, texts_seen):
    path = tmp_path / "texts_bert.p"
    begin(encoder, path)
    assert not path.exists()
    texts_seen.clear()
    vectors = encode(TEXTS, *encoder, masked_mean, batch_size=1, path=path)
    assert texts_seen == [1, 1]
    whole = encode(TEXTS, *encoder, masked_mean)
    assert list(vectors) == list(whole) and [*tmp_path.iterdir()] == [path]
    for item_id, vector in whole.items():
        np.testing.assert_allclose(vectors[item_id], vector, rtol=0, atol=1e-5)
        assert vectors[item_id].flags.writeable


def test_a_run_killed_twice_and_in_another_batch_size_goes_on(encoder, tmp_path, texts_seen):
    path = tmp_path / "texts_bert.p"
    begin(encoder, path, 1)
    begin(encoder, path, 1)
    texts_seen.clear()
    vectors = encode(TEXTS, *encoder, masked_mean, batch_size=64, path=path)
    assert texts_seen == [2] and list(vectors) == list(TEXTS)


def test_a_journal_cut_at_any_byte_or_damaged_costs_time_alone(encoder, tmp_path):
    path = tmp_path / "texts_bert.p"
    whole = encode(TEXTS, *encoder, masked_mean)
    saved = begin(encoder, path, 3).read_bytes()
    zeroed = [saved[:cut] + bytes(len(saved) - cut) for cut in (0, 40, 150)]
    for left in [saved[:cut] for cut in range(0, len(saved), 5)] + zeroed:
        path.with_name(".texts_bert.p.journal").write_bytes(left)
        vectors = encode(TEXTS, *encoder, masked_mean, path=path)
        for item_id, vector in whole.items():
            np.testing.assert_allclose(vectors[item_id], vector, rtol=0, atol=1e-5)


def test_vectors_that_another_process_writes_are_left_alone(encoder, tmp_path, monkeypatch):
    path = tmp_path / "texts_bert.p"
    journal = begin(encoder, path)
    before = journal.read_bytes()
    monkeypatch.setattr(helpers.text, "writing", partial(helpers.text.writing, wait=0.1))
    with FileLock(tmp_path / ".texts_bert.p.lock"), pytest.raises(DataError, match=r"texts_bert\.p is being written"):
        encode({1: "another film"}, *encoder, masked_mean, path=path)
    assert journal.read_bytes() == before and not path.exists()


@pytest.mark.parametrize("changed", ["text", "ids", "pool", "max_length", "model"])
def test_another_recipe_starts_anew(changed, encoder, tmp_path, texts_seen):
    path, pool, options = tmp_path / "texts_bert.p", masked_mean, {}
    texts, (tokenizer, model) = dict(TEXTS), encoder
    begin(encoder, path)
    if changed == "text":
        texts[9] = "toy"
    elif changed == "ids":
        texts = {item_id + 100: text for item_id, text in TEXTS.items()}
    elif changed == "pool":
        pool = last_real_token
    elif changed == "max_length":
        options = {"max_length": 6}
    texts_seen.clear()
    bias = model.encoder.layer[1].output.dense.bias
    with torch.no_grad():
        bias += int(changed == "model")
        vectors = encode(texts, tokenizer, model, pool, path=path, **options)
        expected = encode(texts, tokenizer, model, pool, **options)
        bias -= int(changed == "model")
    assert texts_seen == [4, 4]
    assert all(np.array_equal(vectors[item_id], vector) for item_id, vector in expected.items())


# --- loading


@pytest.mark.parametrize("files", [{}, {"config.json": "{}"}, {"config.json": "not json"}])
def test_folder_without_a_transformer_gets_a_sentence(raw, files):
    folder = raw(files)
    with pytest.raises(DataError, match=f"{folder.name} holds no transformer"):
        load_encoder(folder)


def test_folder_without_weights_gets_a_sentence(raw, folder):
    part = raw({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"})
    with pytest.raises(DataError, match="holds no transformer"):
        load_encoder(part)


def test_truncated_weights_get_a_sentence(raw, folder):
    part = raw({path.name: path.read_bytes() for path in folder.iterdir()})
    weights = part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="holds no transformer"):
        load_encoder(part)


def test_a_layer_without_weights_gets_a_sentence(raw, folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    with pytest.raises(DataError, match=r"its weights lack encoder\.layer\.2\..* \(16 such\)"):
        load_encoder(copied(raw, folder, **{"config.json": json.dumps(config)}))


def test_a_tokenizer_without_words_gets_a_sentence(raw, gpt2_folder):
    part = raw({path.name: path.read_bytes() for path in gpt2_folder.iterdir() if "tokenizer" not in path.name})
    with pytest.raises(DataError, match=r"its tokenizer knows no words; put the model's tokenizer\.json"):
        load_encoder(part)


def test_an_encoder_with_a_decoder_gets_a_sentence(tmp_path, folder):
    config = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="t5 is an encoder with a decoder"):
        load_encoder(tmp_path)


def test_half_precision_and_the_head_of_pretraining_load_quietly_as_float32(tmp_path, folder, capfd):
    config = BertConfig.from_pretrained(folder)
    BertForMaskedLM(config).half().save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    capfd.readouterr()
    model = load_encoder(tmp_path)[1]
    assert (model.dtype, capfd.readouterr()) == (torch.float32, ("", ""))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and a hub that is out of reach."""
    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return tmp_path


def test_a_name_is_found_in_the_cache_of_the_hub(hub_cache, gpt2_folder):
    place, commit = hub_cache / "models--somebody--tiny-gpt2", "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots").mkdir()
    shutil.copytree(gpt2_folder, place / "snapshots" / commit)
    tokenizer, model = load_encoder("somebody/tiny-gpt2")
    assert model.config.model_type == "gpt2" and tokenizer.pad_token == "<|endoftext|>"


def test_a_name_without_network_gets_a_sentence(hub_cache):
    with pytest.raises(DataError, match=r"'bert-base-uncased' is no folder, not in the hub's cache, and the hub is out "
                                        r"of reach \(Name or service not known\): give a folder with its config\.json"):
        load_encoder("bert-base-uncased")


def test_a_name_the_hub_does_not_know_gets_a_sentence(hub_cache, monkeypatch):
    def unknown(source, local_files_only, **_):
        raise OSError(f"{source} is not a model of the hub\nSee its list")

    def refuses(*_, **__):
        raise urllib.error.HTTPError("", 401, "no", {}, None)

    monkeypatch.setattr(urllib.request, "urlopen", refuses)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unknown)
    with pytest.raises(DataError, match=r"the hub does not give it \(nobody/x is not a model of the hub\): give a"):
        load_encoder("nobody/x")


@pytest.mark.parametrize("name", ["no/such/folder", "../folder", "/no/folder", "a name"])
def test_what_is_neither_folder_nor_name_gets_a_sentence(name, monkeypatch):
    monkeypatch.setattr(AutoModel, "from_pretrained", None)
    with pytest.raises(DataError, match="is neither a folder nor a model's name: give a folder"):
        load_encoder(name)
