"""
LMs, text encoders and tokenizers, read from their files.
"""
import json
import os
import re
from contextlib import contextmanager

import torch

from lm import FAMILIES, TextEncoder, unknown_family
from run.errors import ModelError, first_line
from run.lm_checks import (
    ALLOW_CODE,
    SAFE_WEIGHTS,
    hub_file,
    hub_has_answered,
    read_lm_json,
    refuse_folder,
    refuse_gguf,
    refuse_growing_texts,
    refuse_hub_adapter,
    refuse_hub_code,
    refuse_larger_model,
    refuse_variants,
    refuse_what_is_no_lm,
)
from run.lm_compare import compare_once, known_lm

# attention masks and rotary frequencies, which old files of GPT-2 and Llama hold too
BUFFER = re.compile(r'\.attn\.(masked_)?bias$|\.inv_freq$')

# -------------------------------------------------------------------------------------------------
# What transformers prints and raises

def silence_transformers():
    """
    Turn off the progress bars of transformers, and its background request to the hub to convert an
    LM's weights to safetensors.
    """
    from transformers.utils import logging
    logging.disable_progress_bar()
    os.environ.setdefault('DISABLE_SAFETENSORS_CONVERSION', '1')


@contextmanager
def quiet():
    """
    Inside, transformers prints no warnings. Weights that were not found are a ModelError here.
    """
    from transformers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def loading(name):
    """
    Inside, any error of transformers becomes a ModelError of one sentence.
    """
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    # of any kind: the LM may have brought code of its own, and a panic of tokenizers is no Exception
    except BaseException as e:
        reason = first_line(e)
        if 'trust_remote_code' in str(e):
            reason = f"it asks to run its author's code: {ALLOW_CODE}"
        raise ModelError(f"the LM {name!r} could not be loaded ({reason}): --lm= takes the "
                         "Hugging Face name of a causal LM (for CrossSent, of an encoder) that the "
                         "hub or the local cache has, or a folder with config.json, weights and "
                         "tokenizer.") from None


# -------------------------------------------------------------------------------------------------
# Configurations

def hub_config(name, remote):
    """
    The configuration of a hub LM. Raises ModelError where it is an adapter, or what transformers
    raises.
    """
    from huggingface_hub.utils import validate_repo_id
    from transformers import AutoConfig
    validate_repo_id(name)  # or older transformers would take a URL
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=remote)
    except (OSError, ValueError) as e:  # an adapter alone has no config.json
        refuse_hub_adapter(name, local=not hub_has_answered(e))
        raise


def lm_config(name, remote=False, as_data=False):
    """
    The configuration of an LM, and the name or folder that it came from (a run's LM is in its
    folder hf). `remote` lets the LM's authors run their own code on this machine. `as_data` is for
    an LM that somebody else's folder names: its files are read as data, from safetensors, and what
    asks to run code is refused, whatever `remote` says. Raises ModelError.
    """
    from transformers import AutoConfig
    silence_transformers()
    if os.path.isdir(os.path.join(name, 'hf')):
        name = os.path.join(name, 'hf')
        if as_data and os.path.islink(name):
            raise ModelError(f"{name} is a link, and an LM that a received folder names is read "
                             "from its own files alone: put the folder itself there.")
    refuse_gguf(name)
    if os.path.exists(name) and not os.path.isdir(name):
        raise ModelError(f"the LM {name!r} is no folder: --lm= takes the folder that has "
                         "config.json, weights and tokenizer.")
    remote = remote and not as_data
    with loading(name):
        if os.path.isdir(name):
            refuse_folder(name, as_data)
            config = AutoConfig.from_pretrained(name, trust_remote_code=remote)
        else:
            config = hub_config(name, remote)
            if as_data:
                refuse_hub_code(name, config)
    if as_data:
        refuse_what_is_no_lm(config, name)
    way = getattr(config, '_attn_implementation_internal', None)
    if isinstance(way, str) and '/' in way and not remote:
        raise ModelError(f"the LM {name!r} asks for a kernel from the hub (attn_implementation: "
                         f"{way}), which is code: {ALLOW_CODE}.")
    return config, name


# -------------------------------------------------------------------------------------------------
# Tokenizers

class SentencePiece:
    """
    A tokenizer that is sentencepiece's tokenizer.model and nothing else (Hugging Face would want
    protobuf for it).
    """

    def __init__(self, folder):
        import sentencepiece
        model_file = os.path.join(folder, 'tokenizer.model')
        self.sp = sentencepiece.SentencePieceProcessor(model_file=model_file)
        c = {}
        path = os.path.join(folder, 'tokenizer_config.json')
        if os.path.exists(path):
            with open(path, encoding='utf-8') as f:
                c = json.load(f)

        def known(i):
            return i if i >= 0 else None  # -1: it has none

        self.bos_token_id = known(self.sp.bos_id())
        self.eos_token_id = known(self.sp.eos_id())
        self.pad_token_id = known(self.sp.pad_id())
        self.unk_token_id = known(self.sp.unk_id())
        self.before = []
        if self.bos_token_id is not None and c.get('add_bos_token', True):
            self.before = [self.bos_token_id]
        self.after = []
        if self.eos_token_id is not None and c.get('add_eos_token', False):
            self.after = [self.eos_token_id]
        self.truncation_side = 'right'  # where a long text is cut: as Hugging Face's tokenizers

    def __call__(self, texts, add_special_tokens=True, truncation=False, max_length=None):
        before, after = (self.before, self.after) if add_special_tokens else ([], [])
        texts = self.sp.encode(list(texts))
        if truncation:
            room = max(0, max_length - len(before) - len(after))
            left = self.truncation_side == 'left'
            texts = [ids[max(0, len(ids) - room):] if left else ids[:room] for ids in texts]
        return {'input_ids': [before + ids + after for ids in texts]}

    def decode(self, ids):
        return self.sp.decode(list(ids))


def load_tokenizer(name, remote=False, as_data=False):
    """ An LM's tokenizer, by Hugging Face name or by folder. Raises ModelError. """
    from transformers import AutoTokenizer
    _, name = lm_config(name, remote, as_data)
    model_alone = (os.path.exists(os.path.join(name, 'tokenizer.model'))
                   and not os.path.exists(os.path.join(name, 'tokenizer.json')))
    with loading(name):
        if model_alone:
            return SentencePiece(name)
        refuse_growing_texts(os.path.join(name, 'tokenizer.json'))
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=remote and not as_data)
    # without tokenizer files, transformers 5 makes an empty tokenizer of the family's class
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(f"the LM {name!r} has no tokenizer, or one without tokens for texts: put "
                         "its tokenizer.json or tokenizer.model beside the weights.")
    return tokenizer


def tokenizer_notes(tokenizer):
    """ Sentences about what a tokenizer does that may surprise. """
    before = specials(tokenizer)[0]
    doubled = sorted({t for t in before if before.count(t) > 1})
    if doubled:
        return [f"the tokenizer puts the special token {doubled[0]} {before.count(doubled[0])} "
                "times before each text, which few LMs were trained with: check tokenizer.json"]
    return []


def specials(tokenizer):
    """
    The tokens that a tokenizer puts before and behind a text by itself: (<s>, [CLS], [gMASK] <sop>
    .., </s>, [SEP] ..).
    """
    full = list(tokenizer(['a'], add_special_tokens=True)['input_ids'][0])
    bare = list(tokenizer(['a'], add_special_tokens=False)['input_ids'][0])
    for i in range(len(full)):
        if full[i:i + len(bare)] == bare:
            return full[:i], full[i + len(bare):]
    return [], []


def refuse_unknown_tokens(lists, rows, what):
    """
    Raises ModelError where a token id of `lists` (of ids) has no row in an embedding of `rows`
    rows.
    """
    highest = max((max(ids, default=0) for ids in lists), default=0)
    if rows is not None and highest >= rows:
        raise ModelError(f"the tokenizer's ids reach {highest} in {what}, and the embedding of the "
                         f"LM has {rows} rows: tokens were added to the tokenizer alone, so call "
                         "the LM's resize_token_embeddings and train them, or take the tokenizer "
                         "that belongs to it.")


# -------------------------------------------------------------------------------------------------
# Weights

def is_adapter_weight(key):
    """ Whether a weight of this name is of an adapter of peft's: LoRA, its kin, or what it saved. """
    kinds = ('.lora_', '.hada_', '.lokr_', '.ia3_', '.modules_to_save.')
    return any(kind in key for kind in kinds)


def weight_file(name, file, config):
    """ The path of a weight file of an LM, in its folder or from the hub; or None. """
    if not os.path.isdir(name):
        return hub_file(name, file, config)
    path = os.path.join(name, file)
    return path if os.path.isfile(path) else None


def missing_from_shards(folder):
    """
    Names of tensors that the index of a folder's shards has and the shards themselves do not: older
    transformers believe the index, and leave such a weight random without a word.
    """
    from safetensors import safe_open
    index = os.path.join(folder, SAFE_WEIGHTS[1])
    if not os.path.isfile(index) or os.path.isfile(os.path.join(folder, SAFE_WEIGHTS[0])):
        return []
    names = read_lm_json(index)['weight_map']
    found = set()
    for shard in sorted(set(names.values())):
        with safe_open(os.path.join(folder, shard), 'pt') as f:
            found |= set(f.keys())
    return sorted(set(names) - found)


def missing_weights(model, report, unused=()):
    """
    Names of a model's weights that transformers did not find in its files, by its loading report:
    without those that it computes by itself, that share the tensor of one that was found, or that
    begin with `unused`.
    """
    missing = set(report['missing_keys'])
    computed = {k for k, b in model.named_buffers()
                if not b.is_floating_point() or k.endswith('inv_freq')}
    shared = {}  # tensor -> its names: a tied head is in the files once
    for k, p in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(p), []).append(k)
    found = {k for names in shared.values() if not missing.issuperset(names) for k in names}
    return sorted(k for k in missing - computed - found if not k.startswith(unused))


def load_weights(auto, name, config, remote=False, as_data=False, unused=(), instead='', **more):
    """
    The pretrained model of class `auto`, an Auto class of transformers. Raises ModelError where a
    weight of it was not in the files, which transformers would draw at random, but for names that
    begin with one of `unused`. instead: what the user may do.
    """
    local = os.path.isdir(name)
    remote = remote and not as_data
    if as_data:
        if not any(weight_file(name, file, config) for file in SAFE_WEIGHTS):
            raise ModelError(f"the LM {name!r} has no {SAFE_WEIGHTS[0]}, and one that a received "
                             "folder names is read from safetensors alone, as other weight files "
                             "are pickles: save it by save_pretrained of transformers.")
        more['use_safetensors'] = True
    if not local:
        refuse_hub_adapter(name, config)
    with loading(name), quiet():
        if local and not remote:
            refuse_larger_model(auto, name, config)
        # a tensor of another shape is an error of ours below, which says both shapes
        model, report = auto.from_pretrained(
            name,
            trust_remote_code=remote,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **more,
        )
        missing = missing_weights(model, report, unused)
        if local and not missing:
            missing = missing_from_shards(name)

    other = [f"{k} is {list(theirs)} in the file and {list(ours)} by config.json"
             for k, theirs, ours in sorted(report['mismatched_keys']) if not k.startswith(unused)]
    inside = sorted(key for key in report['unexpected_keys'] if is_adapter_weight(key))
    if inside:
        raise ModelError(f"the weight files of the LM {name!r} hold {len(inside)} weights of an "
                         f"adapter that was not merged ({', '.join(inside[:3])}), and without them "
                         "it is another model: load it with peft, call merge_and_unload, and save "
                         "that.")
    leftover = sorted(key for key in report['unexpected_keys'] if not BUFFER.search(key))
    if leftover and not unused:   # the files of an encoder may have a head too
        print(f"  {len(leftover)} weights in the files of the LM {name} are not in the model of its "
              f"config.json and are not used, first {ascii(leftover[0])}")
    total = len(dict(model.named_parameters(remove_duplicate=False)))
    if other:
        raise ModelError(f"{len(other)} of the {total} weights of the LM {name!r} have another "
                         f"shape than its config.json says ({'; '.join(other[:3])}) and would be "
                         f"random numbers: get the config.json that belongs to them{instead}.")
    if missing:
        names = ', '.join(missing[:3]) + (' ..' if len(missing) > 3 else '')
        raise ModelError(f"{len(missing)} of the {total} weights of the LM {name!r} are not in its "
                         f"files ({names}) and would be random numbers: get all of its files "
                         f"again, or save it again from the class that it was trained as{instead}.")
    return model


def empty_lm(name, remote=False, as_data=False):
    """
    The LM without a weight in memory, on the meta device, from its configuration alone. Raises
    ModelError.
    """
    from transformers import AutoModelForCausalLM
    config, name = lm_config(name, remote, as_data)
    if getattr(config, 'is_encoder_decoder', False):
        raise unknown_family(config.model_type)
    with loading(name), torch.device('meta'):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=remote and not as_data)


def with_rows(tokenizer, hf):
    """
    The tokenizer, with a new attribute embedding_rows: how many rows the embedding of its model
    has. Prints what may surprise about the tokenizer.
    """
    for note in tokenizer_notes(tokenizer):
        print('  ' + note)
    tokenizer.embedding_rows = len(hf.get_input_embeddings().weight)
    return tokenizer


def load_lm(name, dtype=torch.float32, random_init=False, remote=False, as_data=False, data_dir=None):
    """
    A pretrained causal LM and its tokenizer, by Hugging Face name or by folder (a run of
    system='lm' is one too). random_init: an LM of the same shape with random weights, as a control.
    The LM is compared with transformers' own forward (run/lm_compare.py), once for each `data_dir`.
    Raises ModelError where neither the hub, nor the local cache, nor a folder has it.
    """
    from transformers import AutoModelForCausalLM
    config, name = lm_config(name, remote, as_data)
    # refuse what no row of FAMILIES computes before its weights are read
    if config.model_type in FAMILIES:
        refuse_variants(config)
    else:
        known_lm(empty_lm(name, remote, as_data))
    if random_init:
        with loading(name):
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=remote and not as_data)
            hf = hf.to(dtype)
    else:
        hf = load_weights(AutoModelForCausalLM, name, config, remote, as_data, dtype=dtype,
                          instead="; --lm_init=random is for an LM that shall be random")
    lm = known_lm(hf)
    folder = None if data_dir is None or random_init else os.path.join(data_dir, 'lm_checks')
    compare_once(lm, name, folder)
    return lm, with_rows(load_tokenizer(name, remote, as_data), lm.hf)


def load_frozen_lm(k, dtype, as_data):
    """
    The FrozenLM that the knobs (LMKnobs) describe, and its tokenizer. Raises ModelError.
    """
    is_random = k['lm_init'] == 'random'
    lm, tokenizer = load_lm(k['lm'], dtype, is_random, k['trust_remote_code'], as_data, k['data_dir'])
    return cut_to_depth(lm, k['lm_depth']), tokenizer


def cut_to_depth(lm, depth):
    """
    The LM, which runs its first `depth` layers alone (0: all). The final norm comes behind the last
    of these. Raises ModelError.
    """
    if depth > lm.n_layers:
        raise ModelError(f"lm_depth={depth} is more than the {lm.n_layers} layers of this LM: lower "
                         "it, or take 0 for all of them.")
    lm.n_layers = depth or lm.n_layers
    return lm


def width_of_lm(k):
    """
    The width D of the LM that the knobs name, from its configuration; 0 where that has none, which
    FrozenLM refuses. Raises ModelError.
    """
    return getattr(lm_config(k['lm'], k['trust_remote_code'])[0], 'hidden_size', 0)


def load_encoder(name, remote=False, as_data=False):
    """
    A pretrained encoder and its tokenizer, by Hugging Face name or by folder. Raises ModelError.
    """
    from transformers import AutoModel
    config, name = lm_config(name, remote, as_data)
    # TextEncoder leaves the pooler out
    hf = load_weights(AutoModel, name, config, remote, as_data, unused=('pooler.',),
                      instead="; --lm=new is for an encoder that shall be random")
    encoder = TextEncoder(hf.float())
    return encoder, with_rows(load_tokenizer(name, remote, as_data), encoder.hf)
