"""What a written model folder says to those who serve it: transformers, vLLM, llama.cpp.

A score model is written as nanosafe's and Safe-RLHF's own class, or as the classifier with one
label that others open."""

import copy

from nanosafe.checkpoint.families import choose_written_family
from nanosafe.errors import stop
from nanosafe.printing import print_once, say_once

# Keys of a score model's config.json that a classifier has no use for.
ONLY_OF_SCORE_MODELS = (
    "bias",
    "score_bias",
    "score_dim",
    "do_normalize",
    "normalizer_type",
    "momentum",
    "mean",
    "var",
)
# Keys of a generation_config.json that say how it was made.
NOT_KEPT = ("_from_model_config", "transformers_version")


# ---- special tokens, and generation_config.json ----


def describe_special_tokens(tokenizer):
    """What config.json says of a tokenizer: None where it has no such token."""
    several_ends = len(tokenizer.eos_ids) > 1
    return {
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
        "eos_token_id": tokenizer.eos_ids if several_ends else tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id if tokenizer.pad_id >= 0 else None,
    }


def make_generation_json(sampling, tokenizer):
    """The generation_config.json of a policy. Generation stops at each of its eos_token_id.

    sampling   the source's generation_config.json, or {}: a server takes temperature and top_p from
               there, and they were chosen for the source's weights
    tokenizer  or None, and then there are no ids that are sure"""
    generation = {}
    for key, value in sampling.items():
        if key not in NOT_KEPT:
            generation[key] = value
    if tokenizer is not None:
        ids = describe_special_tokens(tokenizer)
        ids["eos_token_id"] = tokenizer.eos_ids
        generation.update(ids)
    return {key: value for key, value in generation.items() if value is not None}


def warn_of_another_tokenizer(model_type, tokenizer):
    """Say it where transformers 5 will read a tokenizer in another way than nanosafe."""
    if model_type == "qwen2" and not tokenizer.engine.is_cut_as_qwen2:
        say_once(
            "note: AutoTokenizer of transformers 5 cuts texts as Qwen2 does in every qwen2 folder, "
            "and this tokenizer does not: take PreTrainedTokenizerFast.from_pretrained there"
        )


# ---- a score model as a classifier ----


def check_can_be_a_classifier(path, config, head, tokenizer):
    """Stop unless transformers' classifier gives the scores of this model.

    Its score is the product of the last hidden state and a vector: there is no bias."""
    for_others = "--to=hf writes it for nanosafe and Safe-RLHF"
    if head != "score":
        stop(f"{path!r} is a policy, and has no score head: --to=hf writes policies")
    if tokenizer is None:
        stop(f"{path!r} has no tokenizer, and a classifier must say which token is padding")
    kind = choose_written_family(config)
    if kind == "baichuan":
        stop(f"{path!r}: transformers has no classifier for the model_type {kind}: {for_others}")
    if config.score_bias:
        stop(f"{path!r} has a score head with a bias, which a classifier has not: {for_others}")
    if config.do_normalize and config.score_type != "critic":
        stop(
            f"{path!r} normalizes its scores, which a classifier does not: set do_normalize to "
            "false in its config.json to write the scores as they are before that"
        )
    template = tokenizer.template
    if template and template.behind_an_answer != template.end_of_turn:
        rest = template.behind_an_answer.removeprefix(template.end_of_turn)
        print_once(
            f"note: the chat template writes {rest!r} behind {template.end_of_turn!r}, where this "
            "model was never trained to score: cut it off before a classifier reads the text"
        )


def rename_score_head(tensors):
    """Yield (name, tensor) with a classifier's name for the score head."""
    for name, tensor in tensors:
        yield name.replace("score_head.", "score."), tensor


def make_classifier_json(config_json):
    """The config.json of a classifier with one label, from that of a score model."""
    values = {}
    for key, value in config_json.items():
        if key not in ONLY_OF_SCORE_MODELS:
            values[key] = value
    score_class = values["architectures"][0]
    label = values["score_type"]
    values["architectures"] = [score_class.replace("ForScore", "ForSequenceClassification")]
    values["num_labels"] = 1
    values["id2label"] = {"0": label}
    values["label2id"] = {label: 0}
    values["problem_type"] = "regression"  # vLLM would make a probability of the score otherwise
    return values


def choose_padding(tokenizer):
    """A tokenizer that pads with a token which never ends a text.

    A classifier's score is that of the last token that is not pad_token_id. Our texts end with an
    end of sequence, so that a model that pads with it would be asked one token too early."""
    unknown = tokenizer.names.get("unk_token")
    if isinstance(unknown, dict):
        unknown = unknown.get("content")
    unknown_token = tokenizer.added.get(unknown) if isinstance(unknown, str) else None
    unknown_id = unknown_token.id if unknown_token else -1
    for id in (tokenizer.pad_id, unknown_id, tokenizer.bos_id):
        if id >= 0 and id not in tokenizer.eos_ids:
            padding = copy.copy(tokenizer)
            padding.names = {**tokenizer.names, "pad_token": tokenizer.contents[id]}
            padding.pad_id = id
            return padding
    stop(
        "a classifier needs a token to pad with that ends no text: name one as pad_token in the "
        "tokenizer_config.json of the score model"
    )
