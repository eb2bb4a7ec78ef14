"""attn_implementation="mate" against Transformers' own attention, on small random models."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import masking_utils  # noqa: E402

from mate.integrations import transformers as mate_transformers  # noqa: E402

WINDOW = 5  # narrower than every prompt here
VOCABULARY = 61
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,  # wide enough for the attention to be far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

# model -> (configuration, class, the implementation that serves everything that the model needs)
MODELS = {
    "llama": lambda: (transformers.LlamaConfig(**DECODER), transformers.LlamaForCausalLM, "sdpa"),
    "mistral": lambda: (
        transformers.MistralConfig(**DECODER, sliding_window=WINDOW),
        transformers.MistralForCausalLM,
        "sdpa",
    ),
    "gemma2": lambda: (
        transformers.Gemma2Config(
            **DECODER,
            sliding_window=WINDOW,
            layer_types=ALTERNATING,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=9,
        ),
        transformers.Gemma2ForCausalLM,
        "eager",
    ),
    "gpt-oss": lambda: (
        transformers.GptOssConfig(
            **DECODER,
            sliding_window=WINDOW,
            layer_types=ALTERNATING,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        transformers.GptOssForCausalLM,
        "eager",
    ),
    "llama4": lambda: (
        transformers.Llama4TextConfig(
            **DECODER,
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention"] * 2,
            num_local_experts=2,
            intermediate_size_mlp=40,
            moe_layers=[],
        ),
        transformers.Llama4ForCausalLM,
        "sdpa",
    ),
    "bert": lambda: (transformers.BertConfig(**ENCODER), transformers.BertModel, "sdpa"),
    "modernbert": lambda: (
        transformers.ModernBertConfig(
            **ENCODER,
            local_attention=2 * WINDOW,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
        transformers.ModernBertModel,
        "sdpa",
    ),
}
DECODERS = ["llama", "mistral", "gemma2", "gpt-oss", "llama4"]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    mate_transformers.register()


@pytest.fixture
def no_sdpa(monkeypatch):
    """PyTorch's own attention raises."""

    def refuse(*_, **__):
        raise AssertionError("PyTorch's attention was called")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)


def pair(name):
    """The same random model with Transformers' attention and with MATE's."""
    config, model_class, reference = MODELS[name]()
    torch.manual_seed(3)
    config._attn_implementation = reference
    expected = model_class(config).eval()
    config = copy.deepcopy(config)
    config._attn_implementation = "mate"
    model = model_class(config).eval()
    model.load_state_dict(expected.state_dict())
    return expected, model


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def padded(side):
    """Token ids of 4 sequences and the mask of their padding."""
    lengths = torch.tensor([13, 9, 4, 1])
    place = torch.arange(13)
    if side == "left":
        mask = place >= 13 - lengths[:, None]
    elif side == "right":
        mask = place < lengths[:, None]
    else:
        start = torch.tensor([0, 2, 8, 12])[:, None]
        mask = (place >= start) & (place < start + lengths[:, None])
    return tokens(4, 13).where(mask, 0), mask.long()


def outputs(model, **inputs):
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def new_cache(kind, model, length):
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=length)
    return transformers.DynamicCache(config=model.config)


def assert_same(actual, expected, tolerance=2e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_generation(expected, model, **inputs):
    options = {
        "max_new_tokens": 3 * WINDOW,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want, got = expected.generate(**inputs, **options), model.generate(**inputs, **options)
    assert_same(torch.stack(got.logits), torch.stack(want.logits))
    assert torch.equal(got.sequences, want.sequences)


# ---- Whole models ----


@pytest.mark.parametrize("name", MODELS)
def test_forward(name):
    expected, model = pair(name)
    ids = tokens(2, 3 * WINDOW)
    assert_same(outputs(model, input_ids=ids), outputs(expected, input_ids=ids))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_forward(name, side):
    expected, model = pair(name)
    ids, mask = padded(side)
    is_token = mask.bool()
    want = outputs(expected, input_ids=ids, attention_mask=mask)[is_token]
    assert_same(outputs(model, input_ids=ids, attention_mask=mask)[is_token], want)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_forward_with_padding_between_tokens(name):
    expected, model = pair(name)
    ids = tokens(2, 9)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 1, 0, 0]])
    want = outputs(expected, input_ids=ids, attention_mask=mask)[mask.bool()]
    assert_same(outputs(model, input_ids=ids, attention_mask=mask)[mask.bool()], want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name, cache):
    expected, model = pair(name)
    assert_same_generation(expected, model, inputs=tokens(2, 2 * WINDOW), cache_implementation=cache)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_from_left_padded_prompts(name, cache):
    expected, model = pair(name)
    ids, mask = padded("left")
    assert_same_generation(expected, model, inputs=ids, attention_mask=mask, cache_implementation=cache)


def test_generate_compiled():
    """A static cache: the masks are made ahead, outside what is compiled, and one graph serves every length."""
    expected, model = pair("llama")
    ids, mask = padded("left")
    compiled = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True  # else only on a GPU
    options = {"attention_mask": mask, "max_new_tokens": 2 * WINDOW, "do_sample": False}
    got = model.generate(ids, cache_implementation="static", compile_config=compiled, **options)
    assert torch.equal(got, expected.generate(ids, **options))


def test_generate_by_beam_search():
    expected, model = pair("llama")
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    ids = tokens(2, 7)
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_prefill_in_pieces(name, cache):
    """Several queries after keys that the cache already holds, past the window and back to one query."""
    expected, model = pair(name)
    ids = tokens(2, 4 * WINDOW)

    def in_pieces(model):
        held = new_cache(cache, model, ids.shape[1])
        pieces = ids.split([2, 4, 1, 9, 1, 3], dim=1)
        return torch.cat([outputs(model, input_ids=piece, past_key_values=held) for piece in pieces], dim=1)

    got = in_pieces(model)
    assert_same(got, in_pieces(expected))
    assert_same(got, outputs(model, input_ids=ids))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_decode_after_right_padding(name, cache):
    """The padding then stands between the prompt and what follows, in the window and later out of it."""
    expected, model = pair(name)
    counts = [1, 1, 3, 1] if name == "llama" else [1] * 7
    ids, mask = padded("right")

    def decode(model):
        held = new_cache(cache, model, 20)
        outputs(model, input_ids=ids, attention_mask=mask, past_key_values=held)
        logits = []
        for seed, count in enumerate(counts):
            following = torch.nn.functional.pad(mask, (0, held.get_seq_length() + count - 13), value=1)
            new = tokens(4, count, seed)
            logits.append(outputs(model, input_ids=new, attention_mask=following, past_key_values=held))
        return torch.cat(logits, dim=1)

    assert_same(decode(model), decode(expected))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_by_position_ids(name):
    expected, model = pair(name)
    lengths = [9, 1, 12]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = tokens(1, sum(lengths))
    got = outputs(model, input_ids=ids, position_ids=position_ids, use_cache=False)
    assert_same(got, outputs(expected, input_ids=ids, position_ids=position_ids, use_cache=False))
    alone = [outputs(model, input_ids=piece) for piece in ids.split(lengths, dim=1)]
    assert_same(got, torch.cat(alone, dim=1))


def test_packed_by_cu_seq_lens():
    """A decoder that builds its mask without position_ids, and a module without a mask, as in vision towers."""
    lengths = [9, 1, 12]
    cu_seqlens = torch.tensor([0, 9, 10, 22])
    packing = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": 12,
        "max_length_k": 12,
    }
    _, model = pair("gpt-oss")
    ids = tokens(1, sum(lengths))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    got = outputs(model, input_ids=ids, position_ids=position_ids, use_cache=False, **packing)
    alone = [outputs(model, input_ids=piece) for piece in ids.split(lengths, dim=1)]
    assert_same(got, torch.cat(alone, dim=1))

    kv_lengths = [5, 4, 2]
    packing |= {"cu_seq_lens_k": torch.tensor([0, 5, 9, 11]), "max_length_k": 5}
    q = torch.randn(1, 4, sum(lengths), 16)
    k, v = torch.randn(2, 1, 4, sum(kv_lengths), 16).unbind()
    got, _ = mate_transformers.attention_forward(torch.nn.Module(), q, k, v, None, is_causal=False, **packing)
    pieces = zip(q.split(lengths, dim=2), k.split(kv_lengths, dim=2), v.split(kv_lengths, dim=2))
    want = [torch.nn.functional.scaled_dot_product_attention(*piece) for piece in pieces]
    assert_same(got, torch.cat(want, dim=2).transpose(1, 2))


def test_cross_attention():
    """Keys of their own length and padding, as many as the queries or not."""
    torch.manual_seed(5)
    config = transformers.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)
    config._attn_implementation = "sdpa"
    expected = transformers.BertLMHeadModel(config).eval()
    config = copy.deepcopy(config)
    config._attn_implementation = "mate"
    model = transformers.BertLMHeadModel(config).eval()
    model.load_state_dict(expected.state_dict())
    for length in (6, 13):
        _, encoder_mask = padded("right")
        inputs = {
            "input_ids": tokens(4, length),
            "encoder_hidden_states": torch.randn(4, 13, 48),
            "encoder_attention_mask": encoder_mask,
        }
        # Rounding alone takes the logits of this model 5e-4 away from those in float64, whichever attention it has.
        assert_same(outputs(model, **inputs), outputs(expected, **inputs), tolerance=2e-3)


@pytest.mark.usefixtures("no_sdpa")
def test_attention_is_mates():
    for name in MODELS:
        _, model = pair(name)
        outputs(model, input_ids=tokens(1, 6))


def test_half_precision():
    expected, model = pair("gpt-oss")
    expected, model = expected.to(torch.bfloat16), model.to(torch.bfloat16)
    ids = tokens(2, 12)
    want, got = (outputs(m, input_ids=ids).float() for m in (expected, model))
    assert (got - want).square().mean().sqrt() < 0.05 * want.square().mean().sqrt()


# ---- Masks ----


def dense(mask, batch_size):
    """An AttentionMask without packing as booleans (b, q_length, kv_length), by what MATE's arguments mean."""
    rows = []
    for b in range(batch_size):
        start = int(mask.cache_leftpad[b]) if mask.cache_leftpad is not None else 0
        end = int(mask.cache_seqlens[b]) if mask.cache_seqlens is not None else mask.kv_length
        sq = int(mask.seqused_q[b]) if mask.seqused_q is not None else mask.q_length
        p = torch.arange(sq)[:, None] + (end - start) - sq
        j = torch.arange(end - start)[None]
        left, right = mask.visibility.window_size
        right = 0 if mask.visibility.causal else right
        chunk = mask.visibility.attention_chunk
        visible = torch.ones(sq, end - start, dtype=torch.bool)
        visible &= (j >= p - left) if left >= 0 else True
        visible &= (j <= p + right) if right >= 0 else True
        visible &= (p // chunk == j // chunk) if chunk else True
        row = torch.zeros(mask.q_length, mask.kv_length, dtype=torch.bool)
        row[:sq, start:end] = visible
        rows.append(row)
    return torch.stack(rows)


def left_padding(attention_mask, batch_size):
    if attention_mask is None:
        return torch.zeros(batch_size, dtype=torch.int64)
    return (attention_mask.cumsum(dim=-1) == 0).sum(dim=-1)


@pytest.mark.parametrize("padding", [None, "left", "right", "both"])
@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked", "bidirectional", "bidirectional sliding"])
def test_mask_is_what_transformers_means(kind, padding):
    """Every place of the queries among the keys, in dynamic, sliding and static caches."""
    batch_size, length = 4, 13
    attention_mask = padded(padding)[1].bool() if padding else None
    function = {
        "causal": masking_utils.causal_mask_function,
        "sliding": masking_utils.sliding_window_causal_mask_function(4),
        "chunked": masking_utils.chunked_causal_mask_function(4, left_padding(attention_mask, batch_size)),
        "bidirectional": masking_utils.bidirectional_mask_function,
        "bidirectional sliding": masking_utils.sliding_window_bidirectional_mask_function(4),
    }[kind]
    checked = 0
    for q_offset in range(length):
        q_length = length - q_offset
        # A sliding cache has let go of keys that no query sees; a static one has room for more.
        kv_offsets = {0, max(0, q_offset - 3)} if "sliding" in kind or kind == "chunked" else {0}
        for kv_offset in kv_offsets:
            for free in (0, 3) if "bidirectional" not in kind else (0,):
                for offset in (q_offset, torch.tensor(q_offset)):
                    arguments = {
                        "batch_size": batch_size,
                        "q_length": q_length,
                        "kv_length": length - kv_offset + free,
                        "q_offset": offset,
                        "kv_offset": kv_offset,
                        "mask_function": function,
                        "attention_mask": attention_mask,
                    }
                    mask = mate_transformers.make_mask(**arguments)
                    assert mask.packing is None
                    want = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)[:, 0]
                    if attention_mask is not None:  # what a query that is padding sees does not matter
                        is_query = attention_mask[:, q_offset:, None]
                        want = want & is_query
                        got = dense(mask, batch_size) & is_query
                    else:
                        got = dense(mask, batch_size)
                    assert torch.equal(got, want), (q_offset, kv_offset, free)
                    checked += 1
    assert checked >= 2 * length


def test_no_mask_without_need():
    """An ordinary batch is an ordinary call: no lengths, no packing, no window that hides nothing."""
    mask = mate_transformers.make_mask(2, 5, 5, attention_mask=torch.ones(2, 5, dtype=torch.bool))
    plain = mate_transformers.AttentionMask(mate_transformers.Visibility(causal=True), 5, 5)
    assert mask == plain
    wide = masking_utils.sliding_window_causal_mask_function(5)
    assert mate_transformers.make_mask(2, 5, 5, mask_function=wide) == plain


# ---- What MATE cannot express ----


def test_refuses_four_dimensional_mask():
    _, model = pair("llama")
    custom = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="mask given as a tensor"):
        outputs(model, input_ids=tokens(1, 6), attention_mask=custom)


def test_refuses_mask_functions_of_others():
    def prefix(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx < 3

    for function in (
        prefix,
        masking_utils.or_masks(masking_utils.causal_mask_function, prefix),
        masking_utils.and_masks(masking_utils.causal_mask_function, prefix),
        masking_utils.blockwise_overlay(torch.zeros(1, 6, dtype=torch.int64)),
    ):
        with pytest.raises(NotImplementedError, match="cannot express the mask function"):
            mate_transformers.make_mask(1, 6, 6, mask_function=function)


def test_refuses_padding_between_tokens_in_a_window():
    _, model = pair("mistral")
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    with pytest.raises(NotImplementedError, match="padding between tokens"):
        outputs(model, input_ids=tokens(1, 8), attention_mask=mask)


def test_refuses_packed_sequences_with_padding():
    _, model = pair("llama")
    ids, mask = padded("left")
    cu_seqlens = torch.tensor([0, 13, 26, 39, 52], dtype=torch.int32)
    lens = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 13, "max_length_k": 13}
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
        outputs(model, input_ids=ids, attention_mask=mask, **lens)


def test_refuses_dropout():
    config, model_class, _ = MODELS["llama"]()
    config._attn_implementation, config.attention_dropout = "mate", 0.1
    model = model_class(config).train()
    with pytest.raises(NotImplementedError, match="dropout"):
        model(input_ids=tokens(1, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "attention weights"),
        ({"position_bias": torch.zeros(1, 4, 6, 6)}, "position_bias"),
        ({"sliding_window": 3, "is_causal": False}, "bidirectional sliding window"),
    ],
)
def test_refuses_what_changes_the_scores(arguments, message):
    q = k = v = torch.randn(1, 4, 6, 16)
    with pytest.raises(NotImplementedError, match=message):
        mate_transformers.attention_forward(torch.nn.Module(), q, k, v, None, **arguments)


def test_refuses_causal_attention_with_nothing_to_align_it():
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 4, 6, 16)
    with pytest.raises(NotImplementedError, match="needs a mask"):
        mate_transformers.attention_forward(torch.nn.Module(), q, k, k, None)


def test_refuses_queries_outside_the_keys():
    with pytest.raises(NotImplementedError, match=r"queries 0 \.\. 6 are not among 4 keys"):
        mate_transformers.make_mask(1, 6, 4)
    bidirectional = masking_utils.sliding_window_bidirectional_mask_function(2)
    with pytest.raises(NotImplementedError, match="last query at the last key"):
        mate_transformers.make_mask(1, 4, 6, mask_function=bidirectional)


def test_refuses_a_mask_of_another_length():
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 4, 6, 16)
    mask = mate_transformers.make_mask(1, 3, 5, q_offset=2)
    with pytest.raises(ValueError, match="3 queries and 5 keys"):
        mate_transformers.attention_forward(torch.nn.Module(), q, k, k, mask)


def test_refuses_a_mask_made_for_another_kind_of_layer():
    made = mate_transformers.make_mask(1, 6, 6)
    with pytest.raises(ValueError, match="was made for"):
        mate_transformers.make_mask(
            1, 6, 6, mask_function=masking_utils.bidirectional_mask_function, attention_mask=made
        )
