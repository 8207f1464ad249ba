"""
Checks of an LM before it is loaded. Each refuse_ function raises ModelError for what it names:
adapters, GGUF files, special files, links that lead out of a folder, oversized models, code.
"""
import json
import math
import os
import re
import shlex

from run.errors import ModelError

ALLOW_CODE = "--trust_remote_code=True on your own command line allows that"
ADAPTER_FILES = ('adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin')
SAFE_WEIGHTS = ('model.safetensors', 'model.safetensors.index.json')
WEIGHTS = (*SAFE_WEIGHTS, 'pytorch_model.bin', 'pytorch_model.bin.index.json')
# The ways to compute attention and experts that are transformers' own; others are packages, or
# kernels that it downloads
OWN_WAYS = (None, 'eager', 'sdpa', 'flex_attention', 'grouped_mm', 'batched_mm')
# task_type of an adapter -> the name in peft's class for it
PEFT_KINDS = dict(CAUSAL_LM='CausalLM', SEQ_CLS='SequenceClassification', SEQ_2_SEQ_LM='Seq2SeqLM',
                  TOKEN_CLS='TokenClassification', QUESTION_ANS='QuestionAnswering',
                  FEATURE_EXTRACTION='FeatureExtraction')
# Keys of a config file with which transformers runs foreign code, compiles kernels, or imports a
# package that does
CODE_KEYS = ('auto_map', 'custom_generate', 'quantization_config', 'compression_config',
             'kernel_config', 'use_kernels', 'fusion_config', 'distributed_config', 'mecab_kwargs',
             'sudachi_kwargs', 'jumanpp_kwargs')
# transformers calls from_pretrained of whatever class of its own a tokenizer_class names
TOKENIZER_NAME = re.compile(r'(?!Auto|TransfoXL|Rag)\w*(Tokenizer|TokenizerFast|Backend)')
LARGEST_GROWTH = 1000   # of a text by the replacements of a tokenizer
LARGEST_PART = 20_000   # characters that a tokenizer may put before or around each text, as JSON
LARGEST_JSON = 2 ** 28   # bytes of a JSON file of an LM; a tokenizer.json has up to 40 MB
MOST_LISTED = 10_000   # labels or layers of a config.json


def read_lm_json(path):
    """ What a JSON file holds. Raises ModelError where it is none. """
    try:
        if os.path.getsize(path) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON:,} bytes")
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not readable as JSON ({str(e)[:120]}): get that file "
                         "again.") from None


def refuse_huge_config(folder):
    """
    Raises ModelError if the config.json of an LM has too many labels or layers: transformers makes a
    list of them while it reads the config, before any size can be compared with the weights.
    """
    path = os.path.join(folder, 'config.json')
    for part in parts_of(read_lm_json(path)):
        for key, value in part.items():
            listed = key == 'num_labels' or re.search('layers?$', key)
            if listed and type(value) is int and value > MOST_LISTED:
                raise ModelError(f"{path} has {key}={value:,}, and at most {MOST_LISTED:,} are read: "
                                 "get the config.json that belongs to the weights.")


def refuse_larger_model(auto, name, config):
    """
    Raises ModelError if the config.json in the folder `name` describes a model that is many times
    larger than its safetensors files: transformers makes all weights before it compares shapes.
    """
    import torch
    from safetensors import safe_open
    shapes = []
    for file in sorted(os.listdir(name)):
        if file.endswith('.safetensors'):
            with safe_open(os.path.join(name, file), 'pt') as f:
                shapes += [f.get_slice(key).get_shape() for key in f.keys()]
    if not shapes:
        return
    # counted first, because a million layers take long to make even without weights
    too_large = getattr(config, 'num_hidden_layers', 0) > len(shapes)
    if not too_large:
        with torch.device('meta'):
            model = auto.from_config(config)
        in_files = sum(math.prod(shape) for shape in shapes)
        # packed weights are up to eight to a number
        too_large = sum(p.numel() for p in model.parameters()) > 10 * in_files
    if too_large:
        raise ModelError(f"config.json of the LM {name!r} describes a model that is many times larger "
                         "than its weight files: get the config.json that belongs to them.")


def parts_of(value):
    """ The objects in parsed JSON, at any depth, and the value itself if it is one. """
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def refuse_growing_texts(path):
    """
    Raises ModelError if the replacements of a tokenizer.json may make a text LARGEST_GROWTH times
    longer: a few dozens of them, each of which doubles the text, would fill the memory.
    """
    if not os.path.isfile(path):
        return
    tokenizer, growth = read_lm_json(path), 1.0
    around = [tokenizer.get('post_processor')]
    around += [part for part in parts_of(tokenizer.get('normalizer')) if 'prepend' in part]
    if len(json.dumps(around)) > LARGEST_PART:
        raise ModelError(f"the tokenizer in {path} puts too much before or around each text: get "
                         "that file again.")
    for step in parts_of([tokenizer.get('normalizer'), tokenizer.get('decoder')]):
        if step.get('type') != 'Replace':
            continue
        old, new = step.get('pattern'), step.get('content')
        shortest = len(str(old['String'])) if isinstance(old, dict) and 'String' in old else 1
        growth *= max(1.0, len(str(new)) / max(1, shortest))
        if growth > LARGEST_GROWTH:
            raise ModelError(f"the replacements in {path} could make a text more than "
                             f"{LARGEST_GROWTH} times longer: get that file again.")


def is_code_request(key, value):
    """
    Whether this entry of a config file could make transformers run code that is not its own, or
    read outside the folder.
    """
    if key in CODE_KEYS:
        return bool(value)
    if key.removesuffix('_internal').endswith('_implementation'):
        ways = value.values() if isinstance(value, dict) else [value]
        return any(way not in OWN_WAYS for way in ways)
    if key == 'tokenizer_class' and value is not None:
        return not isinstance(value, str) or not TOKENIZER_NAME.fullmatch(value)
    if key == 'model_type':
        return value == 'transfo-xl'  # its tokenizer is a pickle
    if key.endswith('_file') and key != 'special_tokens_map_file':
        # older transformers open such a path, wherever it leads
        return isinstance(value, str) and os.path.lexists(value)
    return False


def code_request(config):
    """
    The first entry in a config (parsed JSON, at any depth) that is_code_request holds for, as 'key:
    value'; or None.
    """
    for part in parts_of(config):
        for key, value in part.items():
            if is_code_request(key, value):
                return f"{key}: {json.dumps(value)[:100]}"
    return None


def refuse_code_request(path, name):
    """ Raises ModelError where the config file at `path` asks for code. """
    request = code_request(read_lm_json(path))
    if request:
        raise ModelError(f"the LM {name!r} asks to run its author's code, or code from elsewhere "
                         f"({request} in {path}), and an LM that a received folder names is read "
                         f"as data alone: {ALLOW_CODE}.")


def refuse_special_files(folder):
    """
    Raises ModelError where an entry of `folder` is neither a file nor a folder: opening a FIFO
    would wait for ever.
    """
    for entry in sorted(os.listdir(folder)):
        path = os.path.join(folder, entry)
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise ModelError(f"{path} is neither a file nor a folder (a pipe, a socket or a "
                             "device): remove it.")


def refuse_links_outside(folder, home):
    """
    Raises ModelError where a link in `folder` leads out of the LM's folder `home`; in the hub's own
    cache, to anything but its blobs.
    """
    root = os.path.realpath(home)
    allowed = [root]
    if os.path.basename(os.path.dirname(root)) == 'snapshots':
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), 'blobs'))
    for entry in sorted(os.listdir(folder)):
        target = os.path.realpath(os.path.join(folder, entry))
        if not any(os.path.commonpath([target, place]) == place for place in allowed):
            raise ModelError(f"{os.path.join(folder, entry)} is a link to {target}, outside the "
                             "LM's folder, and an LM that a received folder names is read from "
                             "its own files alone: put the file itself there.")


def refuse_foreign(folder):
    """
    Raises ModelError where `folder` holds more than the data of an LM: links that lead out, special
    files, requests to run code, weights that are not in its own safetensors files.
    """
    if not os.path.lexists(os.path.join(folder, 'config.json')):
        raise ModelError(f"the LM {folder!r} could not be loaded, because it has no config.json: "
                         "take a folder with config.json, weights and tokenizer.")
    inner = [os.path.join(folder, entry) for entry in sorted(os.listdir(folder))]
    refuse_links_outside(folder, folder)
    for place in filter(os.path.isdir, inner):  # transformers looks no deeper
        refuse_special_files(place)
        refuse_links_outside(place, folder)
    for path in inner:
        entry = os.path.basename(path)
        if entry == 'custom_generate' or entry.startswith('shard-'):
            raise ModelError(f"the LM {folder!r} asks for more than its weights to be read "
                             f"({path}), and an LM that a received folder names is read as data "
                             f"alone: {ALLOW_CODE}.")
        if entry.endswith('.json') and ('config' in entry or entry == 'special_tokens_map.json'):
            refuse_code_request(path, folder)
    refuse_huge_config(folder)
    index = os.path.join(folder, SAFE_WEIGHTS[1])
    shards = read_lm_json(index).get('weight_map', {}).values() if os.path.exists(index) else ()
    for shard in shards:
        if os.path.basename(shard) != shard or not shard.endswith('.safetensors'):
            raise ModelError(f"{index} names {shard!r}, which is no safetensors file of its own "
                             "folder: save that LM again.")


def merge_command(name, adapter):
    """
    (the command that merges an adapter into the weights it was trained on, the folder that it
    writes). `adapter` is its adapter_config.json, parsed.
    """
    local = os.path.isdir(name)
    quoted = json.dumps  # double quotes, as the shell's are single ones
    merged = os.path.normpath(name) + '-merged' if local else name.split('/')[-1] + '-merged'
    kind = PEFT_KINDS.get(adapter.get('task_type'), '')

    def has(*files):
        return local and any(os.path.exists(os.path.join(name, file)) for file in files)

    if has('config.json') and has(*WEIGHTS):
        # Beside the adapter in one folder, transformers would apply the adapter by itself: the
        # weights go to another folder first
        auto = f'For{kind}' if kind not in ('', 'FeatureExtraction') else ''
        code = (f'import shutil, peft, transformers as t; a, b = {quoted(name)}, {quoted(merged)}; '
                f'shutil.copytree(a, b, ignore=shutil.ignore_patterns("adapter_*")); '
                f"peft.PeftModel.from_pretrained(t.AutoModel{auto}.from_pretrained(b), "
                "a).merge_and_unload().save_pretrained(b)")
    else:
        words = adapter.get('base_model_name_or_path', name)
        if has('tokenizer.json', 'tokenizer.model', 'vocab.txt', 'vocab.json'):
            words = name
        peft_class = f"AutoPeftModel{'For' + kind if kind else ''}"
        code = (f"import peft, transformers as t; a, b = {quoted(name)}, {quoted(merged)}; "
                f"peft.{peft_class}.from_pretrained(a).merge_and_unload().save_pretrained(b); "
                f"t.AutoTokenizer.from_pretrained({quoted(words)}).save_pretrained(b)")
    return f"python -c {shlex.quote(code)}", merged


def refuse_adapter(name, config_path, found='adapter_config.json'):
    """
    Raises ModelError with the command that merges the adapter. transformers would apply it if peft
    is installed, and ignore it otherwise. config_path: its adapter_config.json, or None.
    """
    if config_path is None:
        raise ModelError(f"the LM {name!r} has an adapter beside its weights ({found}) without an "
                         "adapter_config.json, so nobody can apply it: get that file, or move the "
                         "adapter away if it does not belong to the LM.")
    adapter = read_lm_json(config_path)
    command, merged = merge_command(name, adapter if isinstance(adapter, dict) else {})
    raise ModelError(f"the LM {name!r} has an adapter ({found}), which is read by no run here: "
                     f"merge it by {command} (needs pip install peft) and take --lm={merged}, or "
                     "move the adapter away to do without it.")


def refuse_folder(folder, as_data):
    """ Raises ModelError for what an LM's folder must not hold. """
    refuse_special_files(folder)
    found = [file for file in ADAPTER_FILES if os.path.exists(os.path.join(folder, file))]
    if found:
        config_path = os.path.join(folder, found[0]) if found[0] == ADAPTER_FILES[0] else None
        refuse_adapter(folder, config_path, found[0])
    if as_data:
        refuse_foreign(folder)


def hub_file(name, file, config=None, local=False):
    """
    The path of a file of a hub LM in the local cache, or None where the LM has no such file (or
    nobody can say).
    """
    from transformers.utils import cached_file
    try:
        return cached_file(name, file, revision=getattr(config, '_commit_hash', None) or 'main',
                           local_files_only=local, _raise_exceptions_for_gated_repo=False,
                           _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)
    except (OSError, ValueError):
        return None


def refuse_hub_adapter(name, config=None, local=False):
    """ Raises ModelError where a hub LM is an adapter, or has one beside its weights. """
    path = hub_file(name, ADAPTER_FILES[0], config, local)
    if path:
        refuse_adapter(name, path)


def refuse_hub_code(name, config):
    """ Raises ModelError where a config file of a hub LM asks for code. """
    for file in ('config.json', 'tokenizer_config.json', 'generation_config.json'):
        path = hub_file(name, file, config)
        if path:
            refuse_code_request(path, name)


def hub_has_answered(error):
    """
    Whether the hub itself said that a file is not there, rather than nobody being reachable.
    """
    names = []
    while error is not None:
        names += [kind.__name__ for kind in type(error).__mro__]
        error = error.__cause__
    return 'EntryNotFoundError' in names and 'LocalEntryNotFoundError' not in names


def refuse_what_is_no_lm(config, name):
    """
    Raises ModelError where a config is of no causal LM or text encoder: models of other kinds read
    files of their own.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
    if not any(type(config) in kind for kind in kinds):
        raise ModelError(f"the LM {name!r} that a received folder names is of the kind "
                         f"{config.model_type!r}, which is no language model that transformers "
                         "knows: take a causal LM or a text encoder.")


def refuse_encoder_decoder(config, name):
    """ Raises ModelError where a model's hidden states of a text are not those of one stack. """
    if getattr(config, 'is_encoder_decoder', False):
        raise ModelError(f"{name!r} is an encoder-decoder ({config.model_type}), whose hidden states "
                         "of a text are not those of one stack of layers: take a causal LM or an "
                         "encoder such as bert-base-uncased or roberta-base.")


def refuse_gguf(name):
    """ Raises ModelError, with commands that dequantise it, where --lm= is a GGUF file or its folder. """
    files = [name] if str(name).endswith('.gguf') else []
    if os.path.isdir(name) and not any(os.path.exists(os.path.join(name, f)) for f in WEIGHTS):
        files = sorted(f for f in os.listdir(name) if f.endswith('.gguf'))
    if files:
        folder, file = os.path.split(files[0]) if files == [name] else (name, files[0])
        code = ('import torch, transformers as t; '
                f'a = dict(pretrained_model_name_or_path={json.dumps(folder or ".")}, '
                f'gguf_file={json.dumps(file)}); '
                'm = t.AutoModelForCausalLM.from_pretrained(**a, dtype=torch.float32); '
                'm.save_pretrained("lm"); t.AutoTokenizer.from_pretrained(**a).save_pretrained("lm")')
        raise ModelError(f"{os.path.join(folder, file)} is a GGUF file, in which the weights are "
                         "quantised: write them as a folder of safetensors by "
                         f"python -c {shlex.quote(code)} (needs pip install gguf) and take --lm=lm.")


def refuse_variants(c):
    """ Raises ModelError where a config asks for what no row of FAMILIES computes. """
    if getattr(c, 'scale_attn_by_inverse_layer_idx', False) or not getattr(c, 'scale_attn_weights', True):
        raise ModelError("this GPT-2 scales attention in a way of its own (scale_attn_* in its "
                         "config), which the frozen LM here does not do: take another LM.")
    if getattr(c, 'word_embed_proj_dim', c.hidden_size) != c.hidden_size:
        raise ModelError(f"this LM's embeddings are {c.word_embed_proj_dim} wide and its layers "
                         f"{c.hidden_size} (as OPT-350m's), which the frozen LM here does not do: "
                         "take another LM.")
    if not getattr(c, 'do_layer_norm_before', True):
        raise ModelError("this OPT has its norms behind attention (do_layer_norm_before=false in "
                         "its config), which the frozen LM here does not do: take another LM.")


def token_limit(c):
    """
    (the most tokens that an LM takes here, what sets this limit), by its config: positions, or less
    where layers see a window of the text, or where rotary angles change with the length.
    """
    limits = [(c.max_position_embeddings, 'positions of this LM')]
    window = getattr(c, 'sliding_window', None)
    windowed = 'sliding_attention' in (getattr(c, 'layer_types', None) or ['sliding_attention'])
    if window and windowed and getattr(c, 'use_sliding_window', True):
        limits.append((window, "tokens that this LM's attention sees (sliding_window in its config)"))
    rope = getattr(c, 'rope_scaling', None) or getattr(c, 'rope_parameters', None) or {}
    if rope.get('rope_type', rope.get('type')) == 'longrope':
        short = (rope.get('original_max_position_embeddings')
                 or getattr(c, 'original_max_position_embeddings', None))
        if short:
            limits.append((short, "tokens from which this LM's rope changes (original_max_position_embeddings)"))
    return min(limits, key=lambda limit: limit[0])
