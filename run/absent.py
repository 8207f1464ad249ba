"""
Looks for the files that a run needs before it loads anything: the corpus, and the LM in the local
cache or on the hub. What is absent is said in one sentence, within two seconds.
"""
import os
import urllib.error
import urllib.request
from pathlib import Path

from corpora.convert import find_source
from corpora.unpickle import CorpusError

# where each published corpus has its folder in the configs -> (its file, SHA-256 of the file)
PUBLISHED = {
    'MOSI': ('unaligned_50.pkl', '78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524'),
    'MOSEI': ('unaligned_50.pkl', 'ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f'),
    'SIMS': ('unaligned_39.pkl', 'c9e20c13ec0454d98bb9c1e520e490c75146bfa2dfeeea78d84de047dbdd442f'),
}
PUBLISHER = 'github.com/thuiar/MMSA'
SECONDS = 1.5   # for the hub's answer


def absent_corpus(source):
    """ Why a corpus can neither be opened nor converted, without a full stop; None if it can. """
    if source == 'toy' or os.path.exists(os.path.join(source, 'meta.json')):
        return None
    try:
        find_source(source)
        return None
    except CorpusError as e:
        reason = str(e).removesuffix('.')
    parts = Path(source).parts
    known = [(name, *PUBLISHED[name]) for name in PUBLISHED
             if name in parts or parts == (PUBLISHED[name][0],)]
    if os.path.exists(source) or not known:
        return reason
    files = ' or '.join(f"{file} of {name} (SHA-256 {digest})" for name, file, digest in known)
    return (f"The corpus {source!r} does not exist: get {files} from its authors, {PUBLISHER}, and "
            "give it with --corpus=FILE")


def absent_lm(name, wait=True):
    """
    Why the LM of this hub name cannot be loaded here, or None if it can or may be. With wait=True a
    hub that has not answered after SECONDS may still answer; with False it counts as unreachable.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    try:
        cached = try_to_load_from_cache(name, 'config.json')
    except HFValidationError:
        return None   # not a name of the hub: loading it says so
    if isinstance(cached, str):
        return None
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    else:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method='HEAD')
            urllib.request.urlopen(request, timeout=SECONDS).close()
            return None
        except urllib.error.HTTPError:
            return None   # it answers
        except (OSError, ValueError) as e:
            if wait and isinstance(getattr(e, 'reason', e), TimeoutError):
                return None
            why = f"{constants.ENDPOINT} cannot be reached ({getattr(e, 'reason', e)})"
    return (f"the LM {name!r} is not in the local cache and {why}: connect to the hub, or give a "
            "folder with config.json, weights and tokenizer with --lm=FOLDER")


def absent_files(k, pending, root, reads_text=True):
    """
    One sentence on the corpus and the LM of a run if one is absent, else None. k: the run's knobs;
    pending: those that name a run that is not trained yet; root: the folder of config/;
    reads_text: whether the run loads its LM at all.
    """
    corpus = absent_corpus(k['corpus'])
    lm = k.get('lm') if reads_text else ''
    named = lm and lm != 'new' and 'lm' not in pending and not os.path.exists(lm)
    lm = absent_lm(lm, wait=not corpus) if named else None
    if not corpus and not lm:
        return None
    toy = os.path.join('config', f"{k['system']}_toy.py")
    if not os.path.isfile(os.path.join(root, toy)):
        toy = ''
    command = f"python train.py {toy}".strip()
    return '; '.join(filter(None, (corpus, lm))) + f"; meanwhile, {command} needs no download."
