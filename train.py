"""
Trains one system, top to bottom.

    python train.py                                              the toy corpus, the whole curriculum, 2-3 minutes
    python train.py config/deepmlf_mosei.py --corpus=unaligned_50.pkl    the paper's run on M-SENA's MOSEI file
    python train.py config/mse_toy_emotion.py                    another system, another task: the LM says a class
    python train.py config/deepmlf_toy.py --seed=1 --n_fusion=4  any knob below or of the system, as --knob=value
    python train.py config/deepmlf_toy.py --help                 the knobs below and the system's own
    torchrun --standalone --nproc_per_node=4 train.py config/..  the same run on four GPUs, or processes

A run is a folder: config.json, log.jsonl, best and last .safetensors (+ .json), test.jsonl,
result.json, report.md, curve.png. `python eval.py out/NAME` reads it. Knobs: defaults here < config
file < command line; a typo stops the run.
"""
import hashlib
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from typing import Literal

import torch

from configurator import AtLeast, Share, configure
from data import CorpusError, Feed, epoch_order, open_corpus
from eval import constant, continuation, evaluate, evaluate_controls
from lm import ModelError
from metrics import BETTER
from model import SYSTEMS
from run import ranks
from run.finite import FirstBad
from run.folder import load_checkpoint, load_info, load_tensors, write_text
from run.interrupt import Interrupt
from run.machine import check_compiler, choose_device, hold_memory
from run.needs import (
    end_with_parent,
    folder_suffix,
    make_prerequisites,
    pending_knobs,
    refuse_other_corpus,
)
from run.record import Record, describe_run, norm_of, refuse_other_knobs, resume_from
from run.report import EvalError, curve_picture, report, write_predictions
from system import checked_loss

# The knobs of every run. Those of a system stand in its class, in model.py and baselines.py.
# what is trained, and on what
system = 'deepmlf'            # a name in SYSTEMS (model.py)
dataset = ''                  # which of a config's variants, as 'mosi': the settings that go with a corpus
needs = []                    # prerequisite configs; unfinished ones are trained first
corpus = 'toy'                # 'toy', a corpus folder, an M-SENA .pkl, or a folder of NAME_train.pkl ..
data_dir = 'data'             # where converted corpora are kept
label = 'label'               # which of the corpus's labels: a score, or classes ('emotion')
train_fraction: Share(with_one=True, with_zero=False) = 1.0   # share of the train split, of each class alike (few-shot)
modalities: Literal['audio', 'vision'] = ['audio', 'vision']  # streams that the model sees; the others arrive empty
shuffle_streams = False       # control: each clip gets the audio and video of another clip of its split
standardise = True            # per feature, with the train split's mean and std
lowercase: Literal['auto', 'never'] = 'auto'   # 'auto': lower-case the corpus if it is all capitals (CMU-MOSI is)
max_text_len: AtLeast(1) = 50  # tokens of a clip's own text; longer texts are cut at the end
# the run
out_dir = ''                  # '' is out/<config>, with -seed<k> and the like behind it
seed: AtLeast(0, bits=63) = 0   # of everything random, but for the toy corpus itself
resume = False                # go on, bitwise, from the last checkpoint in out_dir
fresh = False                 # start over in an out_dir that holds a run (the runs in needs are kept)
device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'   # 'auto': cuda, mps or cpu, the first that is there
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # of LM and autocast
compile = False               # torch.compile the model
deterministic = False         # on a GPU: the same bits each time, at some cost (a CPU does so anyway)
shard_lm: Literal['off', 'node', 'all'] = 'off'   # torchrun: who shares the frozen LM's layers
max_steps = -1                # optimizer steps at most, here and in prerequisites; -1: as epochs say
log_interval: AtLeast(1) = 10   # optimizer steps between log lines
save_interval: AtLeast(0) = 0   # optimizer steps between last checkpoints; 0: after each validation only
# optimization (DeepMLF 5.5, and the release where the paper is silent)
batch_size: AtLeast(1) = 32   # clips in a micro-batch
accumulate: AtLeast(1) = 8    # micro-batches in an optimizer step; 32 x 8 is what the published numbers come from
epochs: AtLeast(1) = 20       # length of the cosine, and the most that is trained
patience: AtLeast(1) = 10     # epochs without a better validation before stopping
select = 'mae'                # validation metric that picks the best checkpoint; 'wf1', 'acc'; 'loss' for an LM
lr: AtLeast(0) = 1e-4         # peak learning rate
lr_min: AtLeast(0) = 1e-7     # learning rate at the end of the cosine, and from then on
warmup_epochs: AtLeast(0) = 1.0  # linear warm-up
weight_decay: AtLeast(0) = 0.1   # on matrices only: not on biases, norms, gates, learnable tokens
beta_1: Share() = 0.9         # AdamW
beta_2: Share() = 0.95        # AdamW
adam_eps: AtLeast(0) = 1e-8   # AdamW
clip: AtLeast(0) = 1.0        # gradient norm at most, after accumulation; 0 is off
# ---------------------------------------------------------------------------------------------------------
_here = os.path.dirname(os.path.abspath(__file__))
_argv = sys.argv[1:]
if all(a.startswith('-') for a in _argv):
    _argv = [os.path.join(_here, 'config', 'deepmlf_toy.py')] + _argv
_argv = [a if a.startswith('-') or os.path.exists(a) else os.path.join(_here, a) for a in _argv]
config = configure(globals(), _argv, systems=SYSTEMS)
System = SYSTEMS[system]

name = os.path.splitext(os.path.basename([a for a in _argv if not a.startswith('-')][-1]))[0]
suffix = folder_suffix(config)
out_dir = config['out_dir'] = out_dir or os.path.join('out', name + suffix)
best_path, last_path = (os.path.join(out_dir, f'{kind}.safetensors') for kind in ('best', 'last'))


def stop(sentence):
    """ The end of a run that cannot go on: one sentence, exit status 1. """
    sys.exit(f"{name}: {sentence}")


interrupt = Interrupt(name, stop)
end_with_parent()

# ---------------------------------------------------------------------------------------------------------
# What can be checked before anything is read, all at once

wrong = System.check(config)
if resume and fresh:
    wrong += ["resume and fresh contradict each other"]
if wrong:
    stop('; '.join(wrong) + '.')

ranks.start()
if shard_lm != 'off' and (ranks.N_RANKS == 1 or not System.frozen_lm):
    stop("shard_lm is for a frozen LM on several processes: start it with torchrun, or leave it "
         "out.")
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')   # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
if os.path.exists(last_path) and not (resume or fresh):
    stop(f"{out_dir} already holds a run: --resume=True goes on with it, --fresh=True starts over, "
         "another --out_dir= keeps both.")
if resume and not os.path.exists(last_path):
    stop(f"there is no checkpoint in {out_dir} to resume from: leave --resume=True out to start.")

# ---------------------------------------------------------------------------------------------------------
# Prerequisites, corpus and model

try:
    if resume:   # before a prerequisite is trained for nothing
        refuse_other_knobs(out_dir, load_info(last_path)['about'], config, pending_knobs(config, SYSTEMS))
    prerequisites = make_prerequisites(config, os.path.join(_here, 'train.py'), SYSTEMS, suffix)
    device, dtype = choose_device(device, dtype, System.float32_bytes, config)
    if compile:
        check_compiler(device)
    with ranks.first():
        clips = open_corpus(corpus, data_dir)
    refuse_other_corpus(prerequisites, clips)
    clips.label('train', label)   # a wrong name gets its sentence before gigabytes are loaded
    torch.manual_seed(seed)
    with ranks.first() if System.makes_files(config) else nullcontext():
        model, tokenizer = System.build(config, clips, out_dir, getattr(torch, dtype), trained=resume)
        feed = Feed(clips, config, tokenizer, device, model)   # text is tokenised once, here
    majority = constant(clips, label, feed.clips['train']) if System.predicts else None
    if majority and select not in majority:
        stop(f"select={select!r} is no metric of the label {label!r}: it has "
             f"{', '.join(majority)}.")
except (CorpusError, EvalError, ModelError, ValueError) as e:
    stop(str(e))
except OSError as e:
    stop(f"cannot write to {out_dir} ({e.strerror or e}): make room, or give another --out_dir.")
if ranks.N_RANKS > 1 and System.one_process:
    stop(f"system={system!r} keeps statistics of the clips it has seen, which several processes "
         "would each have their own of: train it in one.")
loss_scale = 2.0 ** 10 if dtype == 'float16' else 1.0   # a power of two, so that unscaling is exact


def autocast():
    return torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32')


lm_fingerprint = model.lm.fingerprint() if model.lm else feed.lm_fingerprint
if shard_lm != 'off':
    ranks.shard(model.lm, shard_lm, device)
model.to(device)
if device == 'cpu':
    hold_memory()
continued = continuation(model, tokenizer)   # how the frozen LM goes on before anything is trained

# Every trainable weight is in exactly one group, by name, so that a checkpoint can say whose
# moments it holds.
groups = model.param_groups()
named = {n: p for g in groups for n, p in zip(g['names'], g['params'])}
groups = [dict(params=g['params'], weight_decay=weight_decay * g['decay'], scale=g['lr_scale']) for g in groups]
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


def lr_at(step):
    """
    Linear warm-up whose first step is not 0, then a cosine to lr_min at the end of `epochs`, where
    it stays (the release warm-restarts there, with no end). max_steps cuts a run short and leaves
    the schedule alone.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, steps_per_epoch * epochs - warmup_steps))
    return lr_min + 0.5 * (lr - lr_min) * (1 + math.cos(math.pi * done))


about = describe_run(name, config, clips, model, tokenizer, device, dtype, lm_fingerprint)

# ---------------------------------------------------------------------------------------------------------
# Where we are. The last checkpoint has all of it, and resuming is bitwise: the order of the clips
# is a function of (seed, epoch), and what a micro-batch draws, of (seed, step, its number), so it
# matters neither who trains on it nor when.

state = dict(step=0, best=None, best_step=0, stale=0, seconds=0.0, done=False)
if resume:
    try:
        state, before = resume_from(last_path, about, model, named, optimizer)
    except ModelError as e:
        stop(str(e))
    state['done'] = state['stale'] >= patience
    reported = all(os.path.exists(os.path.join(out_dir, f)) for f in ('result.json', 'report.md'))
    if (state['done'] or state['step'] >= n_steps) and ranks.agreed(reported):
        print(f"{name}: finished before, in {out_dir}; python eval.py {out_dir} tests its best "
              "checkpoint again")
        ranks.leave()
        sys.exit(0)
    if before['knobs']['patience'] == patience:
        about['command'] = before['command']   # that makes the same run
record = Record(out_dir, about, stop)
record.open(state['step'], resume, fresh)


def score(split):
    """ The model on a whole split: (metrics, predictions). """
    try:
        return evaluate(model, feed, split, autocast)
    except (ValueError, ModelError) as e:
        stop(f"{split}: {e}.")


interrupt.watch()
print(f"{name}: {system} on {clips.name}, {n_train} clips / ({batch_size} x {accumulate}) = "
      f"{steps_per_epoch} steps an epoch, {n_steps} in all; {n_trainable:,} trainable and "
      f"{n_frozen:,} frozen weights; {device}, {dtype}"
      + (f", {ranks.N_RANKS} processes" if ranks.N_RANKS > 1 else ''))
if ranks.N_RANKS > accumulate:
    feed.notes.append(f"{ranks.N_RANKS} processes share a step's {accumulate} micro-batches: some of them wait")
feed.notes += System.run_notes(config, clips.label('train', label), (n_steps - 1) // steps_per_epoch)
for note in feed.notes:
    print(f"  {note}")

# ---------------------------------------------------------------------------------------------------------
# The loop

low_is_better = BETTER[select] == 'low'
cost, order, order_epoch = feed.cost('train'), None, None
started, first_bad = time.time() - state['seconds'], FirstBad(device)
line_time, line_clips = time.time(), 0   # since the last printed line
model.train()
while state['step'] < n_steps and not state['done']:
    epoch, i = divmod(state['step'], steps_per_epoch)
    if order_epoch != epoch:
        order, order_epoch = epoch_order(cost, batch_size, seed, epoch), epoch
    micro_batches = order[i * accumulate:(i + 1) * accumulate]   # fewer in an epoch's last step: none is dropped
    n_clips, terms = sum(map(len, micro_batches)), {}            # of this step
    n_targets = [feed.n_targets('train', index) for index in micro_batches]
    rounds = range(0, len(micro_batches), ranks.N_RANKS)
    for start in rounds:
        number = start + ranks.RANK                              # torchrun: each process takes every n-th
        spare = number >= len(micro_batches)                     # none left: do one that counts for nothing
        number = 0 if spare else number
        index, n = micro_batches[number], n_targets[number]
        share = len(index) / n_clips                             # the gradient is a mean over clips, not batches
        draw = hashlib.sha256(f'{seed} {state["step"]} {number}'.encode()).hexdigest()
        torch.manual_seed(int(draw[:15], 16))
        lm_weight = torch.tensor(n / max(1, sum(n_targets)) / share)   # and over tokens
        batch = feed('train', index) | dict(epoch=torch.tensor(epoch), lm_weight=lm_weight)
        share = 0.0 if spare else share
        with ranks.unsynced(step_model, start == rounds[-1]):
            try:
                with autocast():
                    out = checked_loss(model, step_model(batch))
            except ModelError as e:
                stop(str(e))
            (out['loss'] * share * loss_scale * ranks.N_RANKS).backward()   # the processes' gradients are averaged
        if not spare:
            model.after_step(batch, out)
        for k, v in (out['terms'] | dict(loss=out['loss'])).items():
            terms[k] = terms.get(k, 0) + v.detach() * share
    if state['step'] == 0:
        idle = [n for n, p in named.items() if p.grad is None]
        if idle:
            stop(f"no loss reaches {len(idle)} of the trained weights, {idle[0]} first: a knob has "
                 "cut them off.")
    for p in named.values() if loss_scale != 1 else ():
        p.grad /= loss_scale
    grad_norm = torch.nn.utils.clip_grad_norm_(named.values(), clip or math.inf)
    first_bad.note(terms | dict(gradient=grad_norm), state['step'] + 1)

    step = state['step'] = state['step'] + 1
    validating = i == steps_per_epoch - 1 or step == n_steps
    logging = validating or step % log_interval == 0
    leaving = ranks.any_of(interrupt.asked)
    saving = validating or leaving or (save_interval and step % save_interval == 0)
    before = [p.detach().clone() for p in named.values()] if logging else None
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step - 1) * group['scale']
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    line_clips += n_clips
    state['seconds'] = time.time() - started

    if logging or saving:   # the only places in a step that wait for the device
        if bad := first_bad.sentence():
            stop(bad)
    if logging:
        terms = {k: float(v) for k, v in sorted(ranks.summed(terms).items())}
        rate = line_clips / max(time.time() - line_time, 1e-9)
        record.log(
            step=step, epoch=round(step / steps_per_epoch, 3), lr=lr_at(step - 1), train=terms,
            grad_norm=float(grad_norm), param_norm=norm_of(named.values()),
            update_norm=norm_of(p - b for p, b in zip(named.values(), before)),
            gates=model.gates(), samples_per_s=round(rate, 1), seconds=round(state['seconds'], 2))
        eta = int((n_steps - step) * state['seconds'] / step)
        losses = '  '.join(f'{k} {v:.3f}' for k, v in terms.items())
        line = (f"  step {step:5d}/{n_steps}  epoch {step / steps_per_epoch:6.2f}  {losses}  |g| "
                f"{float(grad_norm):.2f}  {rate:5.0f} clips/s  ETA {eta // 60}:{eta % 60:02d}")
    if validating:
        valid, _ = score('valid')
        value, best = valid[select], state['best']
        # NaN (Corr of a constant) is better than nothing and worse than anything else
        better = best is None or (math.isnan(best) and not math.isnan(value)) \
            or (value < best if low_is_better else value > best)
        state.update(dict(best=value, best_step=step, stale=0) if better else dict(stale=state['stale'] + 1))
        state['done'] = state['stale'] >= patience
        record.log(step=step, epoch=round(step / steps_per_epoch, 3), valid=valid, best=better)
        line += f"  valid {select} {value:.4f}{' *' if better else ''}"
        if better:
            record.save_best(model, state)
    if logging:
        print(line, flush=True)
        line_time, line_clips = time.time(), 0
    if saving:
        record.save_last(model, named, optimizer, state)
    if leaving:
        stop(f"stopped at step {step} of {n_steps} and saved: --resume=True goes on.")
interrupt.leave()
record.close()

# ---------------------------------------------------------------------------------------------------------
# The end: the best checkpoint by validation reads the test set, once

try:
    ranks.gathered(None)   # nobody reads it before it is written
    load_tensors(model, load_checkpoint(best_path)[0], out_dir)
    if ranks.RANK == 0:
        model.save_for_others(out_dir)
except ModelError as e:
    stop(str(e))
except OSError as e:
    stop(f"trained, but cannot write to {out_dir} ({e.strerror or e}): make room; --resume=True ends it.")
kept = continued and (continued, lm_fingerprint) == (continuation(model, tokenizer), model.lm.fingerprint())
result = dict(about=about, state=state, n_trainable=n_trainable, n_frozen=n_frozen, clips=feed.n_clips,
              info=feed.info, ceilings=clips.meta.get('ceilings'), majority=majority, lm_kept=kept)
result['valid'], _ = score('valid')
result['test'], predictions = score('test')
result['controls'] = evaluate_controls(model, feed, autocast)
result['seconds'] = round(time.time() - started, 1)
try:
    if ranks.RANK == 0:
        if predictions:
            write_predictions(out_dir, clips, predictions)
        write_text(os.path.join(out_dir, 'result.json'), json.dumps(result, indent=1))
        curve_picture(out_dir, select)
        print(report(out_dir))
except (EvalError, ModelError) as e:
    stop(str(e))
except OSError as e:
    stop(f"trained, but cannot write to {out_dir} ({e.strerror}): make room; --resume=True ends "
         "it.")
ranks.leave()
