"""
Trains one thing, top to bottom: an LM, an audiovisual encoder, DeepMLF on both, MSE-Adapter or CMPTA on an LM, CrossSent, or
one of the systems that these are compared with.

    python train.py                                              the toy corpus, the whole curriculum, 2-3 minutes
    python train.py config/deepmlf_mosei.py --corpus=unaligned_50.pkl    the paper's run on M-SENA's MOSEI file
    python train.py config/mse_toy_emotion.py                    another system, another task: the LM says a class
    python train.py config/deepmlf_toy.py --seed=1 --n_fusion=4  any knob below, as --knob=value
    python train.py --help                                       every knob with its default
    torchrun --standalone --nproc_per_node=4 train.py config/..  the same run on four GPUs, or processes

A run is a folder: config.json, log.jsonl, best and last .safetensors (+ .json), test.jsonl, result.json, report.md,
curve.png. `python eval.py out/NAME` reads it. Knobs: defaults here < config file < command line; a typo stops the run.
"""
import hashlib
import json
import math
import os
import platform
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import numpy as np
import torch
import transformers

import ranks
from configurator import configure, read_config
from baselines import OwnLabels
from clips import facts_of
from data import CorpusError, Feed, epoch_order, open_corpus
from eval import (BETTER, RUN_KNOBS, EvalError, constant, continuation, curve_picture, evaluate, read_run, report,
                  write_predictions)
from files import make_plain_folder, open_regular, remove_leftovers, write_text
from knobs import wrong_knobs
from lm import ModelError, empty_lm, tokenizer_fingerprint
from model import build, devices, hold_memory, load_checkpoint, lock, memory, own_tensors, put, rehearse, save_checkpoint

# what is trained, and on what
system = 'deepmlf'            # 'lm', 'av', 'deepmlf', 'mse', 'cmpta', 'crosssent', or one of BASELINES in baselines.py
dataset = ''                  # which of a config's variants, as 'mosi': the settings that go with a corpus
needs = []                    # configs of the runs that this one stands on; those not finished are made first
corpus = 'toy'                # 'toy', a corpus folder, an M-SENA .pkl, or a folder of NAME_train.pkl ..
data_dir = 'data'             # where converted corpora are kept
label = 'label'               # which of the corpus's labels; classes (as 'emotion') for 'mse' and 'cmpta'
train_fraction = 1.0          # share of the train split that is trained on, of each class alike (few-shot)
modalities = ['audio', 'vision']  # streams that the model gets to see; the others arrive empty
shuffle_streams = False       # control: each clip hears and sees another clip of its split
standardise = True            # per feature, with the train split's mean and std
lowercase = 'auto'            # 'auto': lower-case a corpus that is all capitals (CMU-MOSI); 'never'
max_text_len = 50             # tokens of a clip's own text; longer texts are cut at the end
# the run
out_dir = ''                  # '' is out/<config>, with -<dataset>, -seed<k>, -steps<n>, -train<share> behind it where these are set
seed = 0                      # of everything random, but for the toy corpus itself
resume = False                # go on, bitwise, from the last checkpoint in out_dir
fresh = False                 # start over in an out_dir that holds a run (the runs in needs are kept)
device = 'auto'               # 'auto': cuda, mps or cpu, the first that is there
dtype = 'auto'                # of the frozen LM and of autocast: 'auto' is bfloat16 on cuda and where float32 is too
                              # large for the memory, else float32; 'float16' for a GPU without bfloat16
compile = False               # torch.compile the model
deterministic = False         # on a GPU: the same bits each time, at some cost (a CPU does so anyway, with as many threads)
shard_lm = 'off'              # with torchrun: each process holds a share of the frozen LM's layers (FSDP2), for LMs too large for a GPU:
                              # shared by the processes of a 'node' (machine), or by 'all'
max_steps = -1                # optimizer steps at most, here and in the runs that needs makes; -1: as epochs say
log_interval = 10             # optimizer steps between log lines
save_interval = 0             # optimizer steps between last checkpoints; 0: after each validation only
# optimization (DeepMLF 5.5, and the release where the paper is silent)
batch_size = 32               # clips in a micro-batch
accumulate = 8                # micro-batches in an optimizer step; 32 x 8 is what the published numbers come from
epochs = 20                   # length of the cosine, and the most that is trained
patience = 10                 # epochs without a better validation before stopping
select = 'mae'                # validation metric that picks the best checkpoint: 'wf1' or 'acc' for classes, 'loss' for an LM
lr = 1e-4                     # peak learning rate
lr_min = 1e-7                 # at the end of the cosine, and for good
warmup_epochs = 1.0           # linear warm-up
weight_decay = 0.1            # on matrices only: not on biases, norms, gates, fusion tokens
beta_1 = 0.9                  # AdamW
beta_2 = 0.95                 # AdamW
adam_eps = 1e-8               # AdamW
clip = 1.0                    # gradient norm at most, after accumulation; 0 is off
dropout = 0.1                 # in MM blocks, in CMPTA, behind the fusion of a baseline, or in the LM for system='lm'
# the LM
lm = 'gpt2-large'             # Hugging Face name, folder, or the name of a run in needs
lm_init = 'pretrained'        # 'random' keeps its shape and tokenizer alone: a control
trust_remote_code = False     # let an LM's authors run their own code here, for LMs that transformers does not know
checkpoint_lm = False         # 'mse', 'cmpta': compute the LM's layers again in the backward pass, to save memory
lm_text = 'plain'             # system='lm': 'plain' text, or 'rated', with scores and emotions behind it
lm_vocab = 256                # system='lm': sentencepiece tokens, at most
lm_width = 64                 # system='lm': D
lm_layers = 4                 # system='lm'
lm_heads = 4                  # system='lm'
lm_positions = 128            # system='lm': longest input, tokens
# the AV encoder
av_init = 'tune'              # 'tune': pretrained and trained on, 'frozen': pretrained, 'random': from nothing
av_from = ''                  # the run that pretrained it: a folder, or the name of a run in needs
av_width = 30                 # d
av_layers = 3                 # a modality
av_heads = 6                  # attention heads
av_len = 50                   # slots at most of the common audiovisual time line
av_dropout = 0.1              # in the encoder
av_seqaug = 0.2               # SeqAug rate on raw audio and video features (released, not in the paper); 0 is off
# fusion
n_fusion = 12                 # F, learnable fusion tokens
fusion_position = 'after'     # 'after' the last real token, or 'fixed' behind max_text_len as released
mm_layers = [8, 15, 22, 29, 36]  # LM layers, from 1, that an MM block follows
mm_query = 'fusion'           # who looks at audio and video: 'fusion', 'text+fusion', 'text' (Table 10)
mm_gate = 'sigmoid'           # 'sigmoid' starts at .5, 'tanh' at 0, 'none' (Table 13)
mm_ffw = 'full'               # FFW of the MM block: 'full' copy, 'lora' on the LM's own, 'none'
mm_ffw_init = 'lm'            # where the full copy starts: 'lm' or 'random'
mm_heads = 16                 # cross-attention heads
lora_rank = 512               # r
lora_alpha = 8192.0           # the update is scaled by alpha / r
lora_dropout = 0.05           # on the input of the update
head_width = 64               # hidden width of the task head
text_reg = 'seqaug'           # on text embeddings while training: 'seqaug', 'noise', 'dropout', 'none' (Table 12)
text_reg_rate = 0.3           # SeqAug's rate, the noise's std or the dropout's p
text_reg_prob = 0.25          # SeqAug: share of clips that get it
text_reg_draw = 'fixed'       # SeqAug's rate is 'fixed', or drawn: 'beta', 'halfnormal'
# pseudo tokens: MSE-Adapter and CMPTA
prompt = 'en'                 # the question that the LM is asked, in prompts.py: 'en', 'cn', 'toy'
prompt_start = 'auto'         # before all else: 'auto' is what the tokenizer puts there itself; or tokens, as '<|im_start|>'
label_words = 'index'         # a class is answered by its 'index' or its 'name'
label_plus = False            # write +0.6 for 0.6, as the paper's figure; the release does so for Qwen
label_eos = False             # end-of-text behind each label
readout = 'score'             # 'score' all labels at once, 'generate' one greedily, or a learned query and a 'head'
score_estimate = 'expected'   # the score from the labels' probabilities: 'expected' value, 'mode', 'median'
n_pseudo = 4                  # P, pseudo tokens
pseudo_projection = 'released'  # 'released', or 'full': full rank, and scaled to the LM's own embeddings
mse_width = 256               # d
lstm_audio = 64               # hidden width
lstm_vision = 32              # hidden width
msf_scales = [8, 32, 16]      # bottlenecks of Multi-Scale-Fusion are the LM's width over these
mse_tgm = True                # Text-Guide-Mixer: text times audio and video; False: added
mse_msf = True                # Multi-Scale-Fusion; False: left out
tgm_pool = 'real'             # the mean text embedding is over 'real' tokens, or 'padded' ones too as released
cmpta_width = 1024            # d
cmpta_heads = 8               # not stated in the paper, as are the next two
cmpta_layers = 1              # Transformer layers over the six tokens
cmpta_pool = 'mean'           # how a sequence becomes a token: 'mean', 'last', 'learned'
cmpta_align = 'bi'            # temporal alignment by a 'bi' or 'one-way' LSTM, or 'off' (Tables 5, 6)
cmpta_align_text = True       # text too (the paper can be read both ways)
cmpta_attend = True           # False: each token from its own modality, without the CMPT adapter (Tables 5, 6)
# CrossSent: an encoder (--lm=, BERT or RoBERTa family; 'new' makes one of lm_layers x lm_width) and its GMRA
gmra_layer = 1                # encoder layer, from 1, that the GMRA comes before; 0: text only
gmra_width = 0                # d; 0 is the encoder's own width
gmra_heads = 0                # attention heads; 0: as many as the encoder has
gmra_mult = 4.0               # hidden width of the residual adapter over the encoder's; 4 is the paper's parameter count
gmra_concat = 'sequence'      # audio and video one behind the other, or side by side: 'features'
gmra_start = 'identity'       # begin as the encoder without it, or 'random'
resample = 'linear'           # frames onto the text's tokens: 'linear', 'mean'; 'words': one frame a word; 'none': as they are
text_pool = 'first'           # sentence vector: 'first' token, or the 'mean' of them
lr_encoder = 1.0              # learning rate of the encoder over that of what is new
# baselines (baselines.py); lists are for text, audio, vision
text_features = 'tuned'       # text enters by an encoder that is 'tuned', or as the 'frozen' hidden states of any Hugging Face model
sub_widths = [128, 16, 128]   # hidden width of what reads each stream
sub_dropouts = [0.2, 0.2, 0.2]  # in it
text_out = 128                # width of LF-DNN's, TFN's and LMF's text vector
post_width = 128              # hidden width behind the fusion, LF-DNN and TFN
late_streams = ['text', 'audio', 'vision']  # system='late': those that are added up; one alone is a unimodal system
lmf_rank = 3                  # R
mag_beta = 1.0                # the shift is at most this times the text's own length
fusion_width = 50             # d of MulT, MISA, TETFN, ALMT
fusion_heads = 10             # attention heads
fusion_layers = 4             # of each crossmodal stack (MulT, TETFN); of the last one (ALMT)
kernels = [5, 5, 5]           # of the convolutions of MulT and TETFN, steps
attn_dropout = 0.2            # on attention weights
attn_dropout_audio = 0.2      # where audio is looked at (MulT),
attn_dropout_vision = 0.0     # and video
res_dropout = 0.0             # on what a layer adds
embed_dropout = 0.2           # on what enters a stack
misa_diff = 0.1               # weights of MISA's losses: difference,
misa_sim = 0.3                # similarity,
misa_rebuild = 1.0            # and reconstruction
head_widths = [128, 32, 16, 32]  # Self-MM, TETFN: hidden width of the heads of fused, text, audio, vision
head_dropouts = [0.0, 0.1, 0.1, 0.0]  # before them
almt_tokens = 8               # tokens a stream is gathered in
lr_audio = 1.0                # learning rate of what reads audio over lr
lr_vision = 1.0               # of what reads video
lr_factors = 1.0              # of LMF's factors
# ordinal regularisers of CrossSent, for any system that predicts a score by a head; weights ramp up by a cosine
weight_mpr = 0.0              # pairwise ranking
weight_eioi = 0.0             # error outside a tolerance band
mpr_gap = 0.5                 # delta: pairs whose labels are further apart than this
mpr_margin = 0.1              # alpha: margin of a pair, at least
mpr_slope = 0.5               # beta: and this much more for each unit of label difference
eioi_band = 0.25              # epsilon: half width of the band
eioi_power = 1.0              # of the error outside it
ramp_epochs = 5.0             # length of the ramp-up
# DeepMLF's loss: L1 of the task head (weight 1) + these (eqs. 13-14)
weight_av = 1.0               # lambda_av
weight_text = 1.0             # lambda_t
weight_fusion = 1.0           # lambda_f
weight_lm = 1.0               # lambda_LM
# ---------------------------------------------------------------------------------------------------------
_here = os.path.dirname(os.path.abspath(__file__))
_argv = sys.argv[1:]
if all(a.startswith('-') for a in _argv): _argv = [os.path.join(_here, 'config', 'deepmlf_toy.py')] + _argv
_argv = [a if a.startswith('-') or os.path.exists(a) else os.path.join(_here, a) for a in _argv]
_defaults = dict(globals())
config = configure(globals(), _argv)
name = os.path.splitext(os.path.basename([a for a in _argv if not a.startswith('-')][-1]))[0]
suffix = (f'-{dataset}' if dataset not in ('', 'toy') else '') + (f'-seed{seed}' if seed else '') \
    + (f'-steps{max_steps}' if max_steps > 0 else '') \
    + (f'-train{train_fraction:g}' if train_fraction != 1 else '')
out_dir = config['out_dir'] = out_dir or os.path.join('out', name + suffix)


def stop(sentence):
    """ The end of a run that cannot go on: one sentence, exit status 1. """
    sys.exit(f"{name}: {sentence}")


def on_exception(kind, e, trace):
    """ Ctrl-C before the loop or after it is no error of ours either: a sentence, not a traceback. """
    if kind is KeyboardInterrupt: print(f"{name}: interrupted; what was saved is whole, --resume=True goes on.", file=sys.stderr)
    else: sys.__excepthook__(kind, e, trace)
sys.excepthook = on_exception


# ---------------------------------------------------------------------------------------------------------
# What can be checked before anything is read, all at once

wrong = wrong_knobs(config, metrics=tuple(BETTER))
if resume and fresh: wrong += ["resume and fresh contradict each other"]
if wrong: stop('; '.join(wrong) + '.')
_needed = {os.path.splitext(os.path.basename(need))[0]: os.path.join(_here, need) for need in needs}   # name -> config
if system == 'deepmlf' and lm not in _needed:
    try: rehearse(config)
    except ModelError as e: stop(str(e))

ranks.start()
if shard_lm != 'off' and (ranks.N_RANKS == 1 or system not in ('deepmlf', 'mse', 'cmpta')):
    stop("shard_lm is for a frozen LM on several processes: start it with torchrun, or leave it out.")
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')   # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)

# ---------------------------------------------------------------------------------------------------------
# The runs that this one stands on: made here if they are not finished, beside this run

# What both must agree on is passed on. An LM does not read the audiovisual knobs, and the AV encoder reads no text.
SHARED = dict(lm=('corpus', 'data_dir', 'train_fraction', 'lowercase', 'seed', 'device', 'dtype', 'max_steps', 'deterministic'),
              av=('corpus', 'data_dir', 'train_fraction', 'label', 'modalities', 'shuffle_streams', 'standardise', 'seed', 'device',
                  'dtype', 'max_steps', 'deterministic', 'av_width', 'av_layers', 'av_heads', 'av_len'))
stands_on = []
for child, need in _needed.items():
    if child not in (lm, av_from) or (child == av_from and av_init == 'random'): continue
    wanted = {k: _defaults[k] for k in config} | read_config(need, config)
    shared = {k: config[k] for k in SHARED[wanted['system']]}
    # one with other knobs than its config's is another run, and gets another folder (but for those that suffix names)
    other = {k: v for k, v in shared.items() if wanted[k] != v and k not in (*RUN_KNOBS, 'corpus', 'seed', 'max_steps', 'train_fraction')}
    mark = '-' + hashlib.sha256(json.dumps(other, sort_keys=True).encode()).hexdigest()[:6] if other else ''
    folder = os.path.join(os.path.dirname(out_dir), child + suffix + mark)
    if lm == child: lm = config['lm'] = folder
    if av_from == child: av_from = config['av_from'] = folder
    stands_on.append(folder)
    finished = ranks.agreed(os.path.exists(os.path.join(folder, 'result.json')))
    cut_off = ranks.agreed(not finished and os.path.exists(os.path.join(folder, 'last.safetensors')))
    if finished:
        try:
            theirs = read_run(folder)
        except (EvalError, ModelError) as e:
            stop(str(e))
        knobs, best = theirs['about']['knobs'], theirs['state']['best']
        other = [k for k, v in (wanted | shared).items() if k not in RUN_KNOBS and knobs.get(k) != v]
        if other: stop(f"{folder} was trained with {other[0]}={knobs.get(other[0])!r} and this run wants "
                       f"{(wanted | shared)[other[0]]!r}: remove it, or give this run an --out_dir in another folder.")
        print(f"{name} stands on {folder}, trained before (valid {knobs['select']} {best:.4f})")
        continue
    print(f"{name} stands on {child}: {'going on with' if cut_off else 'making'} that first, in {folder}")
    argv = sys.argv
    sys.argv = ['train.py', need, f'--out_dir={folder}'] + [f'--{k}={v}' for k, v in shared.items()]
    if cut_off: sys.argv += ['--resume=True']
    try: runpy.run_path(os.path.join(_here, 'train.py'), run_name='__main__')
    except SystemExit as e:
        if e.code: raise   # or another process has finished it meanwhile
    finally: sys.argv = argv

last_path, best_path = os.path.join(out_dir, 'last.safetensors'), os.path.join(out_dir, 'best.safetensors')
if system == 'deepmlf' and av_init != 'random' and not av_from:
    stop("av_init needs a pretrained AV encoder: --av_from=FOLDER of its run, or --av_init=random.")
if os.path.exists(last_path) and not (resume or fresh):
    stop(f"{out_dir} already holds a run: --resume=True goes on with it, --fresh=True starts over, another --out_dir= "
         "keeps both.")
if resume and not os.path.exists(last_path): stop(f"there is no checkpoint in {out_dir} to resume from: leave --resume=True out to start.")

# ---------------------------------------------------------------------------------------------------------
# Corpus and model

there = devices()
if device == 'auto': device = next(d for d in there if there[d])
if not there[device]: stop(f"device={device} is not there: this machine has {', '.join(d for d in there if there[d])}.")
bf16 = device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
try: too_large = system in ('deepmlf', 'mse', 'cmpta') and not bf16 and dtype == 'auto' and \
    4 * sum(p.numel() for p in empty_lm(lm, trust_remote_code).parameters()) > 0.8 * memory(device)
except ModelError as e: stop(str(e))
if dtype == 'auto': dtype = 'bfloat16' if bf16 else 'float32' if not too_large else 'float16' if device == 'cuda' else 'bfloat16'
if too_large: print(f"  {lm} in float32 is too large for the memory of this machine: {dtype}")
autocast = lambda: torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32')
loss_scale = 2.0 ** 10 if dtype == 'float16' else 1.0   # a power of 2, so exact: or small gradients would vanish in the LM

try:
    with ranks.first(): clips = open_corpus(corpus, data_dir)
    for folder in stands_on:
        with open_regular(os.path.join(folder, 'config.json')) as f: theirs = json.load(f)
        if theirs['corpus']['sha256'] != clips.sha256:
            stop(f"{folder} was trained on another file than {clips.folder} was made from: remove it, or give this run an "
                 "--out_dir in another folder.")
    torch.manual_seed(seed)
    makes_files = system == 'lm' or lm == 'new' or text_features == 'frozen'
    with ranks.first() if makes_files else nullcontext():
        model, tokenizer = build(config, clips, out_dir, getattr(torch, dtype))
        feed = Feed(clips, config, tokenizer, device, getattr(model, 'prompt', None))   # text is tokenised once, here
    majority = None if system == 'lm' else constant(clips, label, feed.clips['train'])
    if majority and select not in majority:
        stop(f"select={select!r} is no metric of the label {label!r}: it has {', '.join(majority)}.")
except (CorpusError, ModelError) as e: stop(str(e))
except OSError as e: stop(f"cannot write to {out_dir} ({e.strerror or e}): make room, or give another --out_dir.")
lm_fingerprint = model.lm.fingerprint() if hasattr(model, 'lm') else feed.lm_fingerprint
if shard_lm != 'off': ranks.shard(model.lm, shard_lm, device)
model.to(device)
if device == 'cpu': hold_memory()
says = continuation(model, tokenizer)   # what its frozen LM says before anything is trained
if ranks.N_RANKS > 1 and any(isinstance(m, (torch.nn.BatchNorm1d, OwnLabels)) for m in model.modules()):
    stop(f"system={system!r} keeps statistics of the clips it has seen, which several processes would each have their own of: train it in one.")

# Every trainable weight is in exactly one group, by name, so that a checkpoint can say whose moments it holds.
groups = model.param_groups()
named = {n: p for g in groups for n, p in zip(g['names'], g['params'])}
groups = [dict(params=g['params'], weight_decay=weight_decay if g['decay'] else 0.0, scale=g['lr_scale']) for g in groups]
optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta_1, beta_2), eps=adam_eps, fused=True)
step_model = ranks.shared(model, named)
if compile: step_model = torch.compile(step_model)
n_trainable = sum(p.numel() for p in named.values())
n_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)

n_train = feed.n_clips['train']
steps_per_epoch = math.ceil(math.ceil(n_train / batch_size) / accumulate)
n_steps = steps_per_epoch * epochs if max_steps < 0 else min(max_steps, steps_per_epoch * epochs)
warmup_steps = round(warmup_epochs * steps_per_epoch)


def lr_at(step):
    """ Linear warm-up whose first step is not 0, then a cosine to lr_min at the end of `epochs`, where it stays (the
    release warm-restarts there, with no end). max_steps cuts a run short and leaves the schedule alone. """
    if step < warmup_steps: return lr * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, steps_per_epoch * epochs - warmup_steps))
    return lr_min + 0.5 * (lr - lr_min) * (1 + math.cos(math.pi * done))


def ramp_at(epoch):
    """ How much of the ordinal regularisers' weights counts in an epoch (from 0): a cosine from 0 to 1. """
    return 0.5 - 0.5 * math.cos(math.pi * min(1.0, epoch / ramp_epochs)) if ramp_epochs else 1.0


def matmul_rate(n=1024):
    """ This machine's float32 matmul rate now, GFLOP/s: a wall time means little without it. """
    a, seconds = torch.randn(n, n), []
    for _ in range(6):
        since = time.perf_counter(); a @ a; seconds.append(time.perf_counter() - since)
    return 2 * n ** 3 / min(seconds) / 1e9


def git(*argv):
    try: return subprocess.run(['git', '-C', _here, *argv], capture_output=True, text=True).stdout.strip()
    except OSError: return ''   # no git here: the run does not need one


about = dict(
    name=name, command=shlex.join(['python', 'train.py', *sys.argv[1:]]), knobs=config,
    commit=git('rev-parse', '--short', 'HEAD'), dirty=bool(git('status', '--porcelain', '--', '*.py')),
    versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                  transformers=transformers.__version__),
    device=device, dtype=dtype, threads=torch.get_num_threads(), processes=ranks.N_RANKS, matmul_gflops=round(matmul_rate(), 1),
    corpus=facts_of(clips),
    lm_fingerprint=lm_fingerprint, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer) if tokenizer else None)

# ---------------------------------------------------------------------------------------------------------
# Where we are. The last checkpoint has all of it, and resuming is bitwise: the order of the clips is a function of
# (seed, epoch), and what a micro-batch draws, of (seed, step, its number), so it matters neither who trains on it nor when.

state = dict(step=0, best=None, best_step=0, stale=0, seconds=0.0, done=False)
log_path = os.path.join(out_dir, 'log.jsonl')
if resume:
    try:
        saved, info = load_checkpoint(last_path)
        before = _defaults | info['about']['knobs']   # a knob younger than that run has its default
        if 'rng' in saved: stop(f"{out_dir} is of a version that drew its random numbers in another way: it can be evaluated, not resumed.")
        other = [k for k in config if k not in RUN_KNOBS and before.get(k) != config[k]]
        if other: stop(f"{out_dir} was trained with {other[0]}={before.get(other[0])!r}, not {config[other[0]]!r}: "
                       "resuming goes on with the same run, so give another --out_dir.")
        other = [what for what, a, b in (('corpus file', info['about']['corpus']['sha256'], clips.sha256),
                                         ('LM', info['about']['lm_fingerprint'], about['lm_fingerprint'])) if a != b]
        if other: stop(f"{out_dir} was trained on another {other[0]} than is there now: put that one back, or give another "
                       "--out_dir.")
        put(model, {k.removeprefix('model.'): v for k, v in saved.items() if k.startswith('model.')}, out_dir)
    except ModelError as e: stop(str(e))
    for n, p in named.items():
        moments = {k: saved.get(f'optimizer.{n}.{k}') for k in ('step', 'exp_avg', 'exp_avg_sq')}
        optimizer.state[p] = {k: v.to(device) for k, v in moments.items()}
    state = info['state'] | dict(done=info['state']['stale'] >= patience)
    through = all(os.path.exists(os.path.join(out_dir, f)) for f in ('result.json', 'report.md'))
    if (state['done'] or state['step'] >= n_steps) and ranks.agreed(through):
        print(f"{name}: finished before, in {out_dir}; python eval.py {out_dir} tests its best checkpoint again")
        ranks.leave()
        sys.exit(0)
    if before['patience'] == patience: about['command'] = info['about']['command']   # that makes the same run


def open_folder():
    """ Makes out_dir this run's own, and returns its log, open. Lines of steps that will be run again are gone from it. """
    global _lock
    os.makedirs(out_dir, exist_ok=True)
    _lock = lock(out_dir)
    if _lock is None: stop(f"another run is writing into {out_dir}: wait for it, or give another --out_dir.")
    remove_leftovers(out_dir)
    # result.json and report.md say that a run is finished, so they go while this one is not; and a fresh start has no past
    past = 'last.safetensors last.json best.safetensors best.json test.jsonl curve.png'.split()
    for old in ['result.json', 'report.md'] + (past if fresh else []):
        if os.path.exists(os.path.join(out_dir, old)): os.remove(os.path.join(out_dir, old))
    write_text(os.path.join(out_dir, 'config.json'), json.dumps(about, indent=1))
    lines = open_regular(log_path).readlines() if resume and os.path.lexists(log_path) else []
    # a line that was being written when the run was killed goes too
    lines = [line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= state['step']]
    write_text(log_path, ''.join(lines))
    return open(log_path, 'a', encoding='utf-8', buffering=1)


try: log_file = open_folder() if ranks.RANK == 0 else None
except OSError as e: stop(f"cannot write to {out_dir} ({e.strerror}): make room, or give another --out_dir.")


def log(**entry):
    if ranks.RANK: return
    try: log_file.write(json.dumps(entry) + '\n')
    except OSError as e: stop(f"cannot write {log_path} ({e.strerror}): make room; --resume=True goes on from the last checkpoint.")


def save(kind):
    """ 'best': what evaluation needs. 'last': that, and the optimizer's moments, for resuming. """
    if ranks.RANK: return
    tensors = own_tensors(model)
    if kind == 'last':
        tensors = {f'model.{k}': v for k, v in tensors.items()}
        tensors |= {f'optimizer.{n}.{k}': v for n, p in named.items() for k, v in optimizer.state.get(p, {}).items()}
    try: save_checkpoint(best_path if kind == 'best' else last_path, tensors, dict(about=about, state=state))
    except ModelError as e: stop(str(e))


def score(split):
    try: return evaluate(model, feed, split, autocast)
    except ValueError as e: stop(f"{split}: {e}.")
    except ModelError as e: stop(str(e))


# Ctrl-C finishes the step, saves and leaves; a second one leaves at once.
interrupted = []
def on_interrupt(*_):
    if interrupted: stop("left at once; the last checkpoint is whole, --resume=True goes on from it.")
    interrupted.append(True)
    print("  stopping after this step ..")
in_main_thread = threading.current_thread() is threading.main_thread()
if in_main_thread: previous_handler = signal.signal(signal.SIGINT, on_interrupt)

print(f"{name}: {system} on {clips.name}, {n_train} clips / ({batch_size} x {accumulate}) = {steps_per_epoch} steps an epoch, "
      f"{n_steps} in all; {n_trainable:,} trainable and {n_frozen:,} frozen weights; {device}, {dtype}"
      + (f", {ranks.N_RANKS} processes" if ranks.N_RANKS > 1 else ''))
if ranks.N_RANKS > accumulate: feed.notes.append(f"{ranks.N_RANKS} processes share a step's {accumulate} micro-batches: some of them wait")
if (weight_mpr or weight_eioi) and ramp_epochs > (n_steps - 1) // steps_per_epoch:   # epochs count from 0
    feed.notes.append(f"ramp_epochs={ramp_epochs:g} does not end within this run's epochs: the regularisers never count in full")
if weight_mpr and mpr_gap >= np.ptp(clips.label('train', label)):
    feed.notes.append(f"mpr_gap={mpr_gap:g} is as large as the labels' whole range: MPR has no pair to rank")
if weight_mpr and mpr_margin > (1 - mpr_slope) * mpr_gap + 1e-9:
    feed.notes.append(f"mpr_margin={mpr_margin:g} is over (1 - mpr_slope) mpr_gap = {(1 - mpr_slope) * mpr_gap:g}: MPR will punish even "
                      "perfect predictions")
for note in feed.notes: print(f"  {note}")

# ---------------------------------------------------------------------------------------------------------
# The loop

low_is_better = BETTER[select] == 'low'
cost, order, order_epoch = feed.cost('train'), None, None
started, first_bad, never = time.time() - state['seconds'], {}, torch.tensor(math.inf, device=device)
line_time, line_clips = time.time(), 0                              # since the last printed line
model.train()
while state['step'] < n_steps and not state['done']:
    epoch, i = divmod(state['step'], steps_per_epoch)
    if order_epoch != epoch: order, order_epoch = epoch_order(cost, batch_size, seed, epoch), epoch
    micro_batches = order[i * accumulate:(i + 1) * accumulate]      # fewer in an epoch's last step: none is dropped
    n_clips, terms = sum(map(len, micro_batches)), {}               # of this step
    n_targets = [feed.n_targets('train', index) for index in micro_batches]
    rounds = range(0, len(micro_batches), ranks.N_RANKS)
    for start in rounds:
        number = start + ranks.RANK                                 # torchrun: each process takes every n-th
        spare = number >= len(micro_batches)                        # who has none left does one that counts for nothing
        if spare: number = 0
        index, n = micro_batches[number], n_targets[number]
        share = len(index) / n_clips                                # the gradient is a mean over clips, not batches
        torch.manual_seed(int(hashlib.sha256(f'{seed} {state["step"]} {number}'.encode()).hexdigest()[:15], 16))
        batch = feed('train', index) | dict(ramp=torch.tensor(ramp_at(epoch)), epoch=torch.tensor(epoch),
                                            lm_weight=torch.tensor(n / max(1, sum(n_targets)) / share))   # and over tokens
        if spare: share = 0.0
        with ranks.unsynced(step_model, start == rounds[-1]):
            try:
                with autocast(): out = step_model(batch)
            except ModelError as e: stop(str(e))
            (out['loss'] * share * loss_scale * ranks.N_RANKS).backward()   # the processes' gradients are averaged
        for k, v in (out['terms'] | dict(loss=out['loss'])).items(): terms[k] = terms.get(k, 0) + v.detach() * share
    if state['step'] == 0:
        idle = [n for n, p in named.items() if p.grad is None]
        if idle: stop(f"no loss reaches {len(idle)} of the trained weights, {idle[0]} first: a knob has cut them off.")
    if loss_scale != 1:
        for p in named.values(): p.grad /= loss_scale
    grad_norm = torch.nn.utils.clip_grad_norm_(named.values(), clip or math.inf)
    for k, v in (terms | dict(gradient=grad_norm)).items():         # noted on the device, which is not asked here
        bad_now = torch.where(torch.isfinite(v), never, state['step'] + 1)
        first_bad[k] = torch.minimum(first_bad.get(k, never), bad_now)

    step = state['step'] = state['step'] + 1
    validating = i == steps_per_epoch - 1 or step == n_steps
    logging = validating or step % log_interval == 0
    leaving = ranks.any_of(interrupted)
    saving = validating or leaving or (save_interval and step % save_interval == 0)
    before = [p.detach().clone() for p in named.values()] if logging else None
    for group in optimizer.param_groups: group['lr'] = lr_at(step - 1) * group['scale']
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    line_clips += n_clips
    state['seconds'] = time.time() - started

    if logging or saving:   # the only places in a step that wait for the device
        bad = {k: int(v) for theirs in ranks.gathered({k: float(v) for k, v in first_bad.items()}) for k, v in theirs.items() if math.isfinite(v)}
        if bad: stop(f"{', '.join(k for k in sorted(bad) if bad[k] == min(bad.values()))} became NaN or inf in step "
                     f"{min(bad.values())}, and nothing was saved since: lower --lr or --clip, or look for the clip that "
                     "does it; --resume=True goes on from before.")
    if logging:
        terms = {k: float(v) for k, v in sorted(ranks.summed(terms).items())}
        norm = lambda tensors: float(torch.stack([t.detach().float().norm() for t in tensors]).norm())
        rate = line_clips / max(time.time() - line_time, 1e-9)
        log(step=step, epoch=round(step / steps_per_epoch, 3), lr=lr_at(step - 1), train=terms, grad_norm=float(grad_norm),
            param_norm=norm(named.values()), update_norm=norm(p - b for p, b in zip(named.values(), before)),
            gates=model.gates() if hasattr(model, 'gates') else None, samples_per_s=round(rate, 1),
            seconds=round(state['seconds'], 2))
        eta = int((n_steps - step) * state['seconds'] / step)
        losses = '  '.join(f'{k} {v:.3f}' for k, v in terms.items())
        line = (f"  step {step:5d}/{n_steps}  epoch {step / steps_per_epoch:6.2f}  {losses}  |g| {float(grad_norm):.2f}  "
                f"{rate:5.0f} clips/s  ETA {eta // 60}:{eta % 60:02d}")
    if validating:
        valid, _ = score('valid')
        value, best = valid[select], state['best']
        # NaN (Corr of a constant) is better than nothing and worse than anything else
        better = best is None or (math.isnan(best) and not math.isnan(value)) \
            or (value < best if low_is_better else value > best)
        state.update(dict(best=value, best_step=step, stale=0) if better else dict(stale=state['stale'] + 1))
        state['done'] = state['stale'] >= patience
        log(step=step, epoch=round(step / steps_per_epoch, 3), valid=valid, best=better)
        line += f"  valid {select} {value:.4f}{' *' if better else ''}"
        if better: save('best')
    if logging:
        print(line, flush=True)
        line_time, line_clips = time.time(), 0
    if saving: save('last')
    if leaving: stop(f"stopped at step {step} of {n_steps} and saved: --resume=True goes on.")
if in_main_thread: signal.signal(signal.SIGINT, previous_handler)
if log_file: log_file.close()

# ---------------------------------------------------------------------------------------------------------
# The end: the best checkpoint by validation reads the test set, once

try:
    ranks.gathered(None)   # nobody reads it before it is written
    put(model, load_checkpoint(best_path)[0], out_dir)
    if system == 'lm' and ranks.RANK == 0:
        make_plain_folder(os.path.join(out_dir, 'hf'))
        model.hf.save_pretrained(os.path.join(out_dir, 'hf'))
except ModelError as e: stop(str(e))
except OSError as e: stop(f"trained, but cannot write to {out_dir} ({e.strerror or e}): make room; --resume=True ends it.")
result = dict(about=about, state=state, n_trainable=n_trainable, n_frozen=n_frozen, clips=feed.n_clips,
              info=feed.info, ceilings=clips.meta.get('ceilings'), majority=majority,
              lm_kept=says and (says, about['lm_fingerprint']) == (continuation(model, tokenizer), model.lm.fingerprint()))
result['valid'], _ = score('valid')
result['test'], predictions = score('test')
if system in ('mse', 'cmpta') and readout != 'head':
    try: result['lm_alone'], _ = evaluate(model, feed, 'test', autocast, adapter=False)   # it sees text only
    except ValueError as e: print(f"  the LM without the adapter: {e}")
result['seconds'] = round(time.time() - started, 1)
try:
    if ranks.RANK == 0:
        if predictions: write_predictions(out_dir, clips, predictions)
        write_text(os.path.join(out_dir, 'result.json'), json.dumps(result, indent=1))
        curve_picture(out_dir, select)
        print(report(out_dir))
except (EvalError, ModelError) as e: stop(str(e))
except OSError as e: stop(f"trained, but cannot write to {out_dir} ({e.strerror}): make room; --resume=True ends it.")
ranks.leave()
