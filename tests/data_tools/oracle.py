"""What of a conversation an assistant wrote, found by growing prefixes with transformers alone; no code of ours.

Turn `i` of a text T begins where T parts from the conversation before it with the generation prompt, and ends at the
last stop token before T parts from the conversation that ends with it. Thinking tags are the turn's, whoever wrote
them. Which tokens stop a model is written down here for each family, as its generation_config.json has it.
"""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

STOPS = {
    "apertus": ["<|assistant_end|>", "<|tools_suffix|>"], "apriel": ["<|end|>"], "bielik": ["<|im_end|>"],
    "bytedance": ["<seed:eos>"], "cohere": ["<|END_OF_TURN_TOKEN|>"], "deepseek": ["<｜end▁of▁sentence｜>"],
    "llama-cpp-deepseek": ["<｜end▁of▁sentence｜>"], "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "exaone": ["[|endofturn|]"], "fireworks": ["<|eot_id|>"], "gemma4": ["<turn|>", "<|tool_response>"],
    "google-gemma-4": [
        "<turn|>", "<|tool_response>"], "gemma": ["<end_of_turn>"], "google-gemma-2": ["<end_of_turn>"],
    "glm": ["<|user|>", "<|observation|>"], "gigachat": ["<|message_sep|>"], "gptoss": [
        "<|return|>", "<|call|>", "<|end|>"], "openai": ["<|return|>", "<|call|>", "<|end|>"],
    "huggingfacetb": ["<|im_end|>"], "ibm": ["<|end_of_text|>"], "idefics3": ["<end_of_utterance>"],
    "inclusionai": ["<|role_end|>"], "kimi-k2": ["<|im_end|>"], "kimi-k3": ["<|end_of_msg|>"],
    "moonshotai": ["<|im_end|>"], "lfm2": ["<|im_end|>"], "llama3": ["<|eot_id|>", "<|eom_id|>"], "meta": [
        "<|eot_id|>", "<|eom_id|>"], "meetkai": ["<|eot_id|>", "<|eom_id|>"], "llava": ["</s>"],
    "microsoft": ["<|end|>"], "phi3": ["<|end|>"], "mimo": ["<|im_end|>"], "minimax-m1": ["<end_of_sentence>"],
    "minimax": ["[e~["], "mistral": ["</s>"], "unsloth-mistral": ["</s>"], "muse": ["<|eot|>"], "nemotron": [
        "<|im_end|>"], "nvidia-nemotron-3": ["<|im_end|>"], "nvidia-nemotron-nano": ["<SPECIAL_12>"],
    "nousresearch": ["<|im_end|>"], "openbmb": ["<|im_end|>"], "qwen": ["<|im_end|>"], "reka": ["<sep>"],
    "smolvlm": ["<end_of_utterance>"], "spark": ["<｜end▁of▁sentence｜>"], "stepfun": ["<|im_end|>"],
    "tencent": ["<｜hy_eos:opensource｜>"], "unsloth-apriel": ["<|end|>"], "upstage": ["<|end|>", "<|calls|>"],
    "llama-cpp-rwkv": ["\n\n"], "poolside": ["</assistant>"],
}  # fmt: skip

_TAGS = re.compile(r"<[|/｜]?[A-Za-z_｜|][^<>\s'\"{}]*>|\[/?[A-Z_]+\]")
_THINK = re.compile(r"[<\[].*think.*[>\]]", re.IGNORECASE)


def stops_of(name):
    """The tokens that stop this model, by the longest name of a family that the template's begins with."""
    return STOPS[max((family for family in STOPS if name.lower().startswith(family)), key=len)]


def tokenizer_for(name, source, renderings=(), normalizer=None):
    """A byte-level BPE that has the tags of a template as special tokens, as its own tokenizer has.

    `renderings` are (messages, tools) whose texts show the tags that the template puts together.
    """
    stops = stops_of(name)
    eos = "<|endoftext|>" if "phi3" in name.lower() or "microsoft" in name.lower() else stops[0]
    plain = _tokenizer(source, sorted({*_TAGS.findall(source), *stops, "<s>", "<pad>", eos}), eos)
    tags = set(plain.all_special_tokens) | set(plain.get_added_vocab())
    for messages, tools in renderings:
        try:
            tags |= set(_TAGS.findall(plain.apply_chat_template(messages, tools=tools, tokenize=False)))
        except Exception:  # whatever templates raise
            pass
    return _tokenizer(source, sorted(tags), eos, normalizer)


def _tokenizer(source, special, eos, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [source],
        trainers.BpeTrainer(
            vocab_size=len(special) + 400,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>", chat_template=source
    )


class Prefixes:
    """The texts of a conversation and of its prefixes. `messages` are in the form that the template reads.

    `doubles`: the template ends a turn with two stop tokens, of which the first already stops the model.
    """

    def __init__(self, tokenizer, messages, tools, stops, doubles=False):
        self.doubles = doubles
        self.tokenizer, self.messages, self.tools = tokenizer, messages, tools
        self.stops = {tokenizer.convert_tokens_to_ids(stop) for stop in stops}
        self.ids = self.render(len(messages))

    def render(self, count, prompt=False):
        return self.tokenizer.apply_chat_template(
            self.messages[:count], tools=self.tools, add_generation_prompt=prompt, return_dict=False
        )

    def start(self, turn):
        """The first token of a turn behind what the generation prompt gives; None where prefixes do not tell it."""
        prompt = self.render(turn, prompt=True)
        given = _common(self.ids, prompt)
        before = _common(prompt, self.render(turn)) if turn else 0
        special = set(self.tokenizer.get_added_vocab().values())
        if given < before and not special.issuperset(prompt[given:]):
            return None  # what is before the turn is written differently once it is there
        start = place = given
        while place and (self._is_blank(self.ids[place - 1]) or self._is_thinking(self.ids[place - 1])):
            place -= 1
            start = place if self._is_thinking(self.ids[place]) else start
        return start

    def stop(self, turn):
        """The place behind the turn's stop token; None where prefixes do not tell it.

        Where a template writes none, which it then does within the next message, one place past the end of the text.
        """
        written = self.render(turn + 1)
        parts = _common(self.ids, written)
        rest = [token for token in written[parts:] if not self._is_blank(token)]
        if any(token not in self.stops and token != self.tokenizer.eos_token_id for token in rest):
            return None  # it is written differently once another message follows
        found = [place for place in range(self.start(turn) or 0, parts) if self.ids[place] in self.stops]
        if found and not (rest and rest[0] in self.stops):
            written = [place for place in range(found[-1] + 1) if not self._is_blank(self.ids[place])]
            while self.doubles and self.ids[written[-2]] in self.stops:
                written.pop()
            return written[-1] + 1
        following = next((place for place in range(parts, len(self.ids)) if not self._is_blank(self.ids[place])), None)
        if following is None:
            return len(self.ids) + 1
        return following + 1 if self.ids[following] in self.stops else None

    def _is_thinking(self, token):
        return _THINK.fullmatch(self.tokenizer.convert_ids_to_tokens(token)) is not None

    def _is_blank(self, token):
        return not self.tokenizer.decode([token]).strip()


def _common(one, other):
    return next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))
