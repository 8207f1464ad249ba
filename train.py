"""
Trains one system. From top to bottom: knobs (settings), checks, data, model, loop, test.

    python train.py                              DeepMLF and its prerequisites, on the toy corpus
    python train.py config/mse_toy_emotion.py    MSE-Adapter: the frozen LM names an emotion
    python train.py config/deepmlf_mosei.py --corpus=unaligned_50.pkl    M-SENA's file of MOSEI
    python train.py config/deepmlf_toy.py --seed=1 --n_fusion=4    --knob=value sets a knob
    python train.py config/deepmlf_toy.py --help                   all knobs of this run
    torchrun --standalone --nproc_per_node=4 train.py config/..    the same run on four processes

A run is a folder: config.json, log.jsonl, best and last .safetensors (+ .json), test.jsonl,
result.json, report.md and .html, curve.png. `python eval.py out/NAME` evaluates it again. Config
files and flags override the defaults here and in the system's class; the last one counts.
"""
import hashlib
import math
import os
import sys
import time
from contextlib import nullcontext
from typing import Literal

import torch

from configurator import AtLeast, Share, configure
from data import Feed, epoch_order, open_corpus
from eval import evaluate, evaluate_controls, majority_metrics
from losses import units_note
from metrics import is_better
from model import SYSTEMS
from run import ranks
from run.average import WeightAverage
from run.errors import UserError
from run.fingerprints import continuation
from run.finite import FirstBad
from run.folder import load_checkpoint, load_tensors, refuse_used_folder
from run.forms import read_header
from run.interrupt import Interrupt
from run.machine import choose_device, hold_memory, print_any_text
from run.needs import (
    end_with_parent,
    folder_suffix,
    make_prerequisites,
    pending_knobs,
    refuse_other_corpus,
)
from run.record import Record, describe_run, lock_run, norm_of, refuse_other_knobs, resume_from
from run.report import print_and_save
from system import checked_loss

# The knobs of every run. The knobs of one system are in its class (model.py, crosssent.py, baselines/).
# Data and task
system = 'deepmlf'            # a name in SYSTEMS (model.py)
dataset = ''                  # in a config with settings for several data sets: the one to use
needs = []                    # prerequisite configs; unfinished ones are trained first
corpus = 'toy'                # 'toy', a corpus folder, an M-SENA .pkl, list pickles, or a table
data_dir = 'data'             # folder of the converted corpora
label = 'label'               # the label of the corpus to predict: a score, or classes ('emotion')
train_fraction: Share(with_one=True, with_zero=False) = 1.0   # train on this share of each class
modalities: Literal['audio', 'vision'] = ['audio', 'vision']  # streams used; others are empty
shuffle_streams = False       # control: each clip gets the audio and video of another clip
standardise = True            # standardise each feature with the train split's mean and std
lowercase: Literal['auto', 'never'] = 'auto'   # 'auto': lower-case a corpus in capitals (CMU-MOSI)
max_text_len: AtLeast(1) = 50  # most tokens of a clip's text without its prompt; the rest is cut
# The run
out_dir = ''                  # '': out/<config>, with suffixes such as -seed1 (run/needs.py)
seed: AtLeast(0, bits=63) = 0   # of all random numbers; the toy corpus is the same for all seeds
resume = False                # continue the run in out_dir from its last checkpoint, bit for bit
fresh = False                 # delete the run in out_dir and start over; its prerequisites are kept
device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'   # 'auto': cuda, else mps, else cpu
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # of the frozen LM and autocast
compile = False               # torch.compile the model
deterministic = False         # slower, deterministic GPU kernels; CPU runs are deterministic anyway
shard_lm: Literal['off', 'node', 'all'] = 'off'   # torchrun: shard the frozen LM over processes
max_steps = -1                # most optimizer steps, also of each prerequisite; -1: no limit
log_interval: AtLeast(1) = 10   # optimizer steps between log lines
save_interval: AtLeast(0) = 0   # optimizer steps between saves of `last`; 0: at validations only
# Optimization: DeepMLF section 5.5 and its released code. Ours: clip by norm, decay of matrices only
batch_size: AtLeast(1) = 32   # clips in a micro-batch
accumulate: AtLeast(1) = 8    # micro-batches per optimizer step; 32 x 8 is that of the release
epochs: AtLeast(1) = 20       # most epochs; also the length of the cosine schedule
patience: AtLeast(1) = 10     # early stopping: epochs without a better validation
select = 'mae'                # metric that selects the best checkpoint: 'wf1', ..; 'loss' for an LM
lr: AtLeast(0) = 1e-4         # peak learning rate
lr_min: AtLeast(0) = 1e-7     # learning rate at the end of the cosine
warmup_epochs: AtLeast(0) = 1.0  # epochs of linear warm-up
weight_decay: AtLeast(0) = 0.1   # on matrices only: not on biases, norms, gates, learnable tokens
beta_1: Share() = 0.9         # AdamW
beta_2: Share() = 0.95        # AdamW
adam_eps: AtLeast(0) = 1e-8   # AdamW
grad_clip: AtLeast(0) = 1.0   # largest gradient norm, after accumulation; 0: no clipping
average_epochs: AtLeast(0) = 0.0   # validate and test the mean weights of about this many epochs
# ---------------------------------------------------------------------------------------------------------
_here = os.path.dirname(os.path.abspath(__file__))
print_any_text()
_argv = sys.argv[1:]
if all(a.startswith('-') for a in _argv):
    _argv = [os.path.join(_here, 'config', 'deepmlf_toy.py')] + _argv
_argv = [a if a.startswith('-') or os.path.exists(a) else os.path.join(_here, a) for a in _argv]
config = configure(globals(), _argv, systems=SYSTEMS)
System = SYSTEMS[system]

name = os.path.splitext(os.path.basename([a for a in _argv if not a.startswith('-')][-1]))[0]
suffix = folder_suffix(config)
out_dir = config['out_dir'] = os.path.normpath(out_dir or os.path.join('out', name + suffix))
best_path, last_path = (os.path.join(out_dir, f'{kind}.safetensors') for kind in ('best', 'last'))


def stop(sentence):
    """ End a run that cannot continue: print one sentence and exit with status 1. """
    ranks.stop(f"{name}: {sentence}")


interrupt = Interrupt(name, stop)
end_with_parent()

# ---------------------------------------------------------------------------------------------------------
# Checks that read no files

ranks.start()
errors = System.check(config)
if resume and fresh:
    errors += ["resume=True and fresh=True exclude each other"]
if errors:
    stop('; '.join(errors) + '.')
if shard_lm != 'off' and (ranks.N_RANKS == 1 or not System.frozen_lm):
    stop("shard_lm needs a frozen LM and several processes: use torchrun, or shard_lm='off'.")
if ranks.N_RANKS > 1 and System.one_process:
    stop(f"system={system!r} keeps statistics of all clips, which several processes cannot share: "
         "train it in one process, without torchrun.")
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')   # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)

# ---------------------------------------------------------------------------------------------------------
# Prerequisites, corpus and model

try:
    refuse_used_folder(out_dir, resume, fresh)
    if resume:   # compare the knobs before any prerequisite is trained
        saved = read_header(last_path)['about']
        refuse_other_knobs(out_dir, saved, config, pending_knobs(config, SYSTEMS))
        dtype = saved['dtype'] if dtype == 'auto' else dtype
    prerequisites = make_prerequisites(config, os.path.join(_here, 'train.py'), SYSTEMS, suffix)
    device, dtype = ranks.agreed(choose_device(device, dtype, System.float32_bytes, config))
    with ranks.first():
        clips = open_corpus(corpus, data_dir)   # a Corpus; the knob corpus is its name
    refuse_other_corpus(prerequisites, clips)
    clips.label('train', label)   # raises at a wrong name before the model is loaded
    torch.manual_seed(seed)
    makes_files = System.makes_files(config)
    folder_lock = lock_run(out_dir, stop) if makes_files else None   # held until the run ends
    with ranks.first() if makes_files else nullcontext():
        torch_dtype = getattr(torch, dtype)
        model, tokenizer = System.build(config, clips, out_dir, torch_dtype, trained=resume)
        feed = Feed(clips, config, tokenizer, device, model)   # tokenises all texts
    majority = majority_metrics(clips, label, feed.clips['train']) if System.predicts else None
    if majority and select not in majority:
        stop(f"select={select!r} is no metric of {label!r}: choose one of {', '.join(majority)}.")
except (UserError, ValueError) as e:
    stop(str(e))
except OSError as e:
    stop(f"cannot write {e.filename or out_dir} ({e.strerror or e}): free space, or set --out_dir.")
loss_scale = 2.0 ** 10 if dtype == 'float16' else 1.0   # a power of two, so that unscaling is exact


def autocast():
    return torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32')


lm_fingerprint = model.lm.fingerprint() if model.lm else feed.lm_fingerprint
if shard_lm != 'off':
    ranks.shard(model.lm, shard_lm, device)
model.to(device)
if device == 'cpu':
    hold_memory()
text_before = continuation(model, tokenizer)   # greedy text of the frozen LM, to compare later

# Every trainable weight is in exactly one group. A checkpoint stores moments by the weight's name.
groups = model.param_groups()
named = {n: p for g in groups for n, p in zip(g['names'], g['params'])}
groups = [dict(params=g['params'], weight_decay=weight_decay * g['decay'], scale=g['lr_scale'])
          for g in groups]
optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta_1, beta_2), eps=adam_eps, fused=True)
step_model = ranks.shared(model, named)
if compile:
    step_model = torch.compile(step_model)
n_trainable = sum(p.numel() for p in named.values())
n_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)

n_train = feed.n_clips['train']
steps_per_epoch = math.ceil(math.ceil(n_train / batch_size) / accumulate)
n_steps = steps_per_epoch * epochs if max_steps < 0 else min(max_steps, steps_per_epoch * epochs)
warmup_steps = round(warmup_epochs * steps_per_epoch)
average = WeightAverage(named, average_epochs * steps_per_epoch)


def lr_at(step):
    """
    The learning rate of a step: linear warm-up, then a cosine to lr_min at the end of `epochs`,
    whatever max_steps is. (DeepMLF's release then restarts at the full rate, until it stops early.)
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, steps_per_epoch * epochs - warmup_steps))
    return lr_min + 0.5 * (lr - lr_min) * (1 + math.cos(math.pi * done))


about = describe_run(name, config, feed, model, tokenizer, device, dtype, lm_fingerprint)

# ---------------------------------------------------------------------------------------------------------
# The state of the run, saved in `last`. A resumed run gives the same bits: the order of the clips
# depends only on (seed, epoch), the random numbers of a micro-batch on (seed, step, its number).

state = dict(step=0, best=None, best_step=0, stale=0, seconds=0.0, done=False)
if resume:
    try:
        state, saved = resume_from(last_path, about, model, named, optimizer, average, n_steps)
    except UserError as e:
        stop(str(e))
    state['done'] = state['stale'] >= patience
    reported = all(os.path.exists(os.path.join(out_dir, f)) for f in ('result.json', 'report.md'))
    if (state['done'] or state['step'] >= n_steps) and ranks.agreed(reported):
        print(f"{name}: already finished; python eval.py {out_dir} tests its best checkpoint again")
        ranks.leave()
        sys.exit(0)
    if saved['knobs']['patience'] == patience:
        about['command'] = saved['command']   # the first command gives the same run from its start
record = Record(out_dir, about, stop)
record.open(state['step'], resume, fresh)


def evaluate_split(split):
    """ Evaluate the model on a whole split -> (metrics, predictions). """
    try:
        return evaluate(model, feed, split, autocast)
    except (UserError, ValueError) as e:
        stop(f"{split}: {str(e).removesuffix('.')}.")


interrupt.watch()
print(f"{name}: training {system} on {n_train} clips of {clips.name}; {device}, {dtype}"
      + (f", {ranks.N_RANKS} processes" if ranks.N_RANKS > 1 else ''))
print(f"  {n_trainable:,} trainable and {n_frozen:,} frozen weights")
print(f"  {n_steps} steps of {batch_size} x {accumulate} clips, {steps_per_epoch} steps per epoch")
if ranks.N_RANKS > accumulate:
    feed.notes.append(f"{ranks.N_RANKS} processes for {accumulate} micro-batches: some are idle")
for note in feed.notes + System.run_notes(config, clips.label('train', label), n_steps / steps_per_epoch):
    print(f"  {note}")

# ---------------------------------------------------------------------------------------------------------
# The loop

cost, order, order_epoch = feed.cost('train'), None, None
started, first_bad = time.time() - state['seconds'], FirstBad(device)
line_time, line_clips = time.time(), 0   # since the last printed line
model.train()
while state['step'] < n_steps and not state['done']:
    epoch, i = divmod(state['step'], steps_per_epoch)
    if order_epoch != epoch:
        order, order_epoch = epoch_order(cost, batch_size, seed, epoch), epoch
    micro_batches = order[i * accumulate:(i + 1) * accumulate]   # fewer in an epoch's last step
    n_clips, terms = sum(map(len, micro_batches)), {}
    n_targets = [feed.n_targets('train', index) for index in micro_batches]
    rounds = range(0, len(micro_batches), ranks.N_RANKS)
    for start in rounds:
        number = start + ranks.RANK            # the micro-batch of this process
        spare = number >= len(micro_batches)   # none is left: repeat the first, with weight 0
        number = 0 if spare else number
        index, n = micro_batches[number], n_targets[number]
        share = len(index) / n_clips           # the loss is a mean over the clips of the step
        digest = hashlib.sha256(f'{seed} {state["step"]} {number}'.encode()).hexdigest()
        torch.manual_seed(int(digest[:15], 16))
        lm_weight = torch.tensor(n / max(1, sum(n_targets)) / share)   # LM loss: mean over tokens
        batch = feed('train', index) | dict(epoch=torch.tensor(epoch), lm_weight=lm_weight)
        share = 0.0 if spare else share
        with ranks.unsynced(step_model, start == rounds[-1]):
            try:
                with autocast():
                    out = checked_loss(model, step_model(batch))
            except UserError as e:
                stop(str(e))
            (out['loss'] * share * loss_scale * ranks.N_RANKS).backward()   # DDP averages gradients
        if not spare:
            model.after_step(batch, out)
        for k, v in (out['terms'] | dict(loss=out['loss'])).items():
            terms[k] = terms.get(k, 0) + v.detach() * share
    if state['step'] == 0:
        print(f"  {units_note(out['terms'], model.units, feed.info)}")
        if idle := [n for n, p in named.items() if p.grad is None]:
            stop(f"{len(idle)} trainable weights, such as {idle[0]}, get no gradient: freeze them, "
                 "or change the knob that cuts them off from the loss.")
    for p in named.values() if loss_scale != 1 else ():
        p.grad /= loss_scale
    grad_norm = torch.nn.utils.clip_grad_norm_(named.values(), grad_clip or math.inf)
    first_bad.note(terms | dict(gradient=grad_norm), state['step'] + 1)

    step = state['step'] = state['step'] + 1
    validating = i == steps_per_epoch - 1 or step == n_steps
    logging = validating or step % log_interval == 0
    leaving = ranks.any_of(interrupt.asked)
    saving = validating or leaving or (save_interval and step % save_interval == 0)
    old_weights = [p.detach().clone() for p in named.values()] if logging else None
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step - 1) * group['scale']
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    average.update(step)
    line_clips += n_clips
    state['seconds'] = time.time() - started

    if logging or saving:   # other steps never wait for the GPU
        if bad := first_bad.sentence():
            stop(bad)
    if logging:
        terms = {k: float(v) for k, v in sorted(ranks.summed(terms).items())}
        rate = line_clips / max(time.time() - line_time, 1e-9)
        record.log(
            step=step, epoch=round(step / steps_per_epoch, 3), lr=lr_at(step - 1), train=terms,
            grad_norm=float(grad_norm), param_norm=norm_of(named.values()),
            update_norm=norm_of(p - b for p, b in zip(named.values(), old_weights)),
            gates=model.gates(), samples_per_s=round(rate, 1), seconds=round(state['seconds'], 2))
        eta = int((n_steps - step) * state['seconds'] / step)
        losses = '  '.join(f'{k} {v:.3f}' for k, v in terms.items())
        line = (f"  step {step:5d}/{n_steps}  epoch {step / steps_per_epoch:6.2f}  {losses}"
                f"  grad_norm {grad_norm:.2f}  {rate:5.0f} clips/s  ETA {eta // 60}:{eta % 60:02d}")
    if validating:
        with average.applied():
            valid, _ = evaluate_split('valid')
            value, stale = valid[select], state['stale'] + 1
            better = is_better(select, value, state['best'])
            state.update(dict(best=value, best_step=step, stale=0) if better else dict(stale=stale))
            if better:
                record.save_best(model, state)
        state['done'] = state['stale'] >= patience
        record.log(step=step, epoch=round(step / steps_per_epoch, 3), valid=valid, best=better)
        line += f"  valid {select} {value:.4f}{' (best)' if better else ''}"
    if logging:
        print(line, flush=True)
        line_time, line_clips = time.time(), 0
    if saving:
        record.save_last(model, named, optimizer, state, average)
    if leaving:
        stop(f"interrupted after step {step} of {n_steps} and saved: --resume=True continues.")
interrupt.leave()
record.close()

# ---------------------------------------------------------------------------------------------------------
# Test: the best checkpoint by validation is evaluated on the test set, once

try:
    ranks.gathered(None)   # wait until rank 0 has written the checkpoint
    load_tensors(model, load_checkpoint(best_path)[0], out_dir)
    if ranks.RANK == 0:
        model.save_for_others(out_dir)
except UserError as e:
    stop(str(e))
except OSError as e:
    stop(f"cannot write to {out_dir} ({e.strerror or e}): free disk space and add --resume=True.")
lm_kept = text_before and (continuation(model, tokenizer) == text_before
                           and model.lm.fingerprint() == lm_fingerprint)
result = dict(about=about, state=state, n_trainable=n_trainable, n_frozen=n_frozen,
              clips=feed.n_clips, info=feed.info, ceilings=clips.meta.get('ceilings'),
              majority=majority, lm_kept=lm_kept)
result['valid'], _ = evaluate_split('valid')
result['test'], predictions = evaluate_split('test')
result['controls'] = evaluate_controls(model, feed, autocast)
result['seconds'] = round(time.time() - started, 1)
try:
    if ranks.RANK == 0:
        print_and_save(out_dir, result, clips, predictions, trained=True)
except UserError as e:
    stop(str(e))
except OSError as e:
    stop(f"cannot write to {out_dir} ({e.strerror or e}): free disk space and add --resume=True.")
ranks.leave()
