"""
The systems that the papers compare with: their forwards against stored arrays, and the bugs of the
known ports as tests.

    python -m pytest -q tests/test_baselines.py
"""
import json
import re

import numpy as np
import pytest
import torch

import eval as evaluation
from baselines import (
    ALMT,
    BASELINES,
    LFDNN,
    LMF,
    MAG,
    MAGBERT,
    MISA,
    TETFN,
    TFN,
    CrossStack,
    Late,
    MulT,
    OwnLabels,
    SelfLabelled,
    SelfMM,
    cmd,
    orthogonality,
)
from configurator import (
    class_annotations,
    class_knobs,
    declared_knobs,
    known_knobs,
    run_knobs,
    wrong_values,
)
from fakes import (
    HERE,
    TINY,
    TOLERANCE,
    Ends,
    golden,
    killed_in_batch,
    needs_golden,
    same_run,
    tiny_batch,
    tiny_bert,
    tiny_lm,
    train,
)
from lm import EncoderKnobs, ModelError, TextEncoder
from losses import OrdinalKnobs
from model import SYSTEMS
from run.load_lm import frozen_text, width_of

SCRIPT = HERE / 'train.py'
COMMON = declared_knobs(SCRIPT)[0]
NAMES = {cls: name for name, cls in BASELINES.items()}
SMALL = dict(
    max_text_len=20, dropout=0.0, sub_widths=[8, 6, 4], sub_dropouts=[0.0] * 3, text_out=5,
    post_width=7, fusion_width=8, fusion_heads=2, fusion_layers=2, kernels=[3, 1, 5],
    attn_dropout=0.0, attn_dropout_audio=0.0, embed_dropout=0.0, head_widths=[8, 5, 4, 3],
    head_dropouts=[0.0] * 4, almt_tokens=3, lr_encoder=0.5, lr_audio=2.0, lr_vision=3.0,
    lr_factors=4.0)

each_system = pytest.mark.parametrize('cls', NAMES, ids=NAMES.values())


class TinyCorpus:
    def __init__(self, widths=None, label_range=(-3, 3)):
        self.widths = dict(audio=5, vision=7) if widths is None else widths
        self.n_clips = dict(train=6)
        self.labels = dict(label=dict(kind='regression', range=list(label_range)),
                           emotion=dict(kind='classes', names=['joy', 'anger']))

    def lengths(self, split, stream):
        return np.array([4, 8, 8])


def tiny_knobs(cls, **knobs):
    """ The knobs of a run of a system, small; those passed must be among them. """
    known = COMMON | class_knobs(cls) | dict(system=NAMES[cls])
    assert set(knobs) <= set(known)
    return known | {name: v for name, v in SMALL.items() if name in known} | knobs


def tiny_baseline(cls, corpus=None, **knobs):
    k, corpus = tiny_knobs(cls, **knobs), corpus or TinyCorpus()
    torch.manual_seed(1)
    if 'text' not in cls.seen(k):
        return cls.assemble(k, corpus, None, None)
    if cls.frozen_features(k):
        return cls.assemble(k, corpus, None, Ends(), 32)
    return cls.assemble(k, corpus, TextEncoder(tiny_bert()), Ends())


def alone(batch, i):
    """ Clip i of a batch, without its padding. """
    one = {name: t[i:i + 1] for name, t in batch.items() if name != 'targets'}
    for m, of in (('tokens', 'text'), ('audio', 'audio'), ('vision', 'vision'), ('text', 'text')):
        n = max(1, int(batch[of + '_len'][i]))
        for name in {m, of + '_mask'} & set(one):
            one[name] = one[name][:, :n]
    return one


# --------------------------------------------------------------------------------------------------
# All of them

@each_system
def test_every_weight_moves_and_padding_is_never_read(cls):
    """ A clip alone gives what it gives in company, with or without audio, video, or more than a
    word: MMSA's LF-DNN, TFN, LMF, MulT and TETFN read padding, its MISA cuts audio and video at the
    text's length. Then three steps. """
    model, batch = tiny_baseline(cls), tiny_batch()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model.eval()
        together = model.predict({name: v for name, v in batch.items() if name != 'label'})
        assert all(v.shape == (3,) for v in together.values())
        for i in range(3):
            pred = model.predict(alone(batch, i))['pred'][0]
            torch.testing.assert_close(pred, together['pred'][i], rtol=0, atol=1e-5)
    model.train()
    groups = model.param_groups()
    scales = {n: g['lr_scale'] for g in groups for n in g['names']}
    assert sorted(scales) == sorted(start)
    assert len(scales) == sum(len(g['params']) for g in groups)
    own = {name.removeprefix('lr_'): v for name, v in model.k.items() if name in SMALL}
    assert all(s == own.get(n.split('.')[0], 1.0) for n, s in scales.items())
    optimizer = torch.optim.AdamW([p for g in groups for p in g['params']], lr=1e-2)
    for seed in range(3):
        batch = tiny_batch(seed) | dict(label=torch.tensor([1.0, -1.0, 0.0]))
        batch['epoch'] = torch.tensor(seed)
        optimizer.zero_grad()
        out = model(batch)
        out['loss'].backward()
        model.after_step(batch, out)
        optimizer.step()
    still = {n for n, p in model.named_parameters() if p.grad is None or torch.equal(p, start[n])}
    # softmax does not see a key's bias; a pre-norm stream of one batch's ReLUs may sleep, so no
    # more is forgiven than this
    assert {n for n in still if not n.endswith('key.bias')} == set()


@each_system
def test_every_knob_is_read(cls):
    """ A knob of a system that its code does not read would mislead. """
    class Reads(dict):
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

    read = set()
    k = Reads(tiny_knobs(cls))
    cls.frozen_features(k)
    model = cls.assemble(k, TinyCorpus(), TextEncoder(tiny_bert()), Ends()).train()
    model.param_groups()
    model(tiny_batch() | dict(epoch=torch.tensor(0)))
    parts = [*EncoderKnobs.__mro__, *OrdinalKnobs.__mro__]
    shared = {name for part in parts for name in vars(part)}
    # dropout is read for a new encoder, by those whose own code does not
    assert set(class_knobs(cls)) - shared - read <= {'dropout', 'text_features'}


@each_system
def test_a_batch_of_one_trains(cls):
    """ BatchNorm has no statistics of one clip, MISA's centred vectors are zero there, Self-MM has
    no clip of the other side. """
    model = tiny_baseline(cls).train()
    for i in range(3):
        batch = alone(tiny_batch(), i) | dict(epoch=torch.tensor(i))
        out = model(batch)
        out['loss'].backward()
        model.after_step(batch, out)
        assert out['loss'].isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_system
def test_forward_changes_nothing(cls):
    """ The only state between steps is after_step's, and BatchNorm's statistics. """
    model = tiny_baseline(cls).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batch = tiny_batch() | dict(epoch=torch.tensor(1))
    out = model(batch)
    assert out['loss'].ndim == 0
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert all('norm' in n for n in changed)
    model.after_step(batch, out)
    after = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} - changed
    assert bool(after) == issubclass(cls, SelfLabelled)
    assert cls.one_process == bool(changed | after)


@pytest.mark.parametrize('cls', [c for c in NAMES if c is not MAGBERT])
def test_frozen_hidden_states_are_the_encoder_that_does_not_learn(cls):
    pool = dict(text_pool='mean') if 'text_pool' in class_knobs(cls) else {}
    tuned, batch = tiny_baseline(cls, **pool).eval(), tiny_batch()
    frozen = tiny_baseline(cls, text_features='frozen', **pool).eval()
    state = tuned.state_dict()
    frozen.load_state_dict({n: t for n, t in state.items() if not n.startswith('encoder.')})
    with torch.no_grad():
        batch['text'] = tuned.encoder(batch['tokens'], batch['text_mask'])
        torch.testing.assert_close(frozen.predict(batch)['pred'], tuned.predict(batch)['pred'])
    assert tuned.views(batch, tuned.predict) and frozen.views(batch, frozen.predict) == {}


@pytest.mark.parametrize('cls', [c for c in NAMES if c is not Late])
def test_a_corpus_without_video_is_refused(cls):
    sentence = (f"system='{NAMES[cls]}' needs audio and vision, and this corpus has no vision: take "
                "another corpus, or the system that has the knob late_streams")
    with pytest.raises(ModelError, match=sentence):
        tiny_baseline(cls, TinyCorpus(dict(audio=5)))


def test_one_stream_alone_is_a_unimodal_system():
    model = tiny_baseline(Late, TinyCorpus({}), late_streams=['text']).eval()
    assert model.predict(tiny_batch())['pred'].shape == (3,)
    with pytest.raises(ModelError, match='this corpus has no audio'):
        tiny_baseline(Late, TinyCorpus({}))
    # it reads nothing else
    heard = {name: v for name, v in tiny_batch().items()
             if name == 'index' or name.startswith('audio')}
    model = tiny_baseline(Late, TinyCorpus(dict(audio=5)), late_streams=['audio']).eval()
    assert list(model.predict(heard)) == ['pred', 'audio']


def test_a_unimodal_system_has_no_text_model(tmp_path):
    """ Whatever --lm= says: no such LM is looked for. """
    k = tiny_knobs(Late, late_streams=['vision', 'audio'], modalities=['audio'], lm='no/such')
    assert Late.seen(k) == ['audio'] and not Late.frozen_features(k)
    model, tokenizer = Late.build(k, TinyCorpus(), str(tmp_path))
    assert tokenizer is None and model.encoder is None and model.views({}, None) == {}
    assert Late.seen(tiny_knobs(Late)) == ['text', 'audio', 'vision']
    assert LFDNN.seen(tiny_knobs(LFDNN)) == ['text', 'audio', 'vision']


@pytest.mark.parametrize('features', ['tuned', 'frozen'])
def test_a_pretrained_text_model_is_built(features, tmp_path):
    """ By its folder; where hidden states are frozen, its width is known and no weight loaded. """
    from transformers import BertTokenizerFast
    tiny_bert().save_pretrained(tmp_path / 'bert')
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'film']
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    BertTokenizerFast(str(tmp_path / 'vocab.txt')).save_pretrained(tmp_path / 'bert')
    corpus = TinyCorpus()
    corpus.text = lambda split: ['a film'] * 6
    k = tiny_knobs(MISA, text_features=features, lm=str(tmp_path / 'bert'), lowercase='never')
    assert MISA.check(k) == [] and MISA.makes_files(k) == (features == 'frozen')
    model, tokenizer = MISA.build(k, corpus, str(tmp_path), as_data=True)
    assert (model.encoder is None) == (features == 'frozen')
    assert model.enter['text'][0].in_features == 32
    assert tokenizer(['a film'])['input_ids'] == [[2, 5, 6, 3]]


@pytest.mark.parametrize('cls, knobs, sentence', [
    (MAGBERT, dict(text_features='frozen'), 'is none of tuned'),
    (MAGBERT, dict(resample='none'), 'is none of linear, mean, words'),
    (MulT, dict(fusion_heads=3), 'does not divide fusion_width=8'),
    (TETFN, dict(fusion_heads=3), 'does not divide fusion_width=8'),
    (ALMT, dict(almt_tokens=0), 'almt_tokens=0 must be at least 1'),
    (SelfMM, dict(text_features='frozen', lm='gpt2'), "take text_pool='mean'"),
    (SelfMM, dict(head_widths=[1, 2, 3]), 'must be 4 numbers'),
    (TFN, dict(text_features='frozen', lm='new'), "is for an --lm= that exists"),
    (Late, dict(late_streams=['text', 'video']), "'video' is none of text, audio, vision"),
    (Late, dict(late_streams=[]), "must hold at least one stream"),
    (Late, dict(sub_dropouts=[0.1, 0.1, 1.0]), r'must be in \[0, 1\)')])
def test_knobs_that_do_not_fit(cls, knobs, sentence):
    """ Each is one sentence, before anything is read. """
    k = tiny_knobs(cls, **knobs)
    assert wrong_values(tiny_knobs(cls), class_annotations(cls)) + cls.check(tiny_knobs(cls)) == []
    wrong = wrong_values(k, class_annotations(cls)) or cls.check(k)
    assert len(wrong) == 1
    assert re.search(sentence, wrong[0])


def test_what_only_the_model_or_the_corpus_can_tell():
    with pytest.raises(ModelError, match='past the 40 positions'):
        tiny_baseline(MISA, max_text_len=41)
    with pytest.raises(ModelError, match="'emotion' is one of classes"):
        tiny_baseline(TFN, label='emotion')


@each_system
def test_the_ordinal_losses_are_two_knobs_here_too(cls):
    """ They add what they weigh, ramped, to any of them; off, the loss is the system's own. """
    batch = tiny_batch() | dict(epoch=torch.tensor(1), label=torch.tensor([2.0, -1.0, 0.5]))
    plain = tiny_baseline(cls).train()
    both = tiny_baseline(cls, weight_mpr=0.3, weight_eioi=0.2, eioi_band=0.1, ramp_epochs=2.0)
    losses = []
    for model in (plain, both.train()):
        torch.manual_seed(5)  # the same dropout in both
        losses.append(model(batch))
    off, on = losses
    assert not {'mpr', 'eioi'} & set(off['terms'])
    assert on['terms']['mpr'] > 0 and on['terms']['eioi'] > 0
    more = 0.5 * (0.3 * on['terms']['mpr'] + 0.2 * on['terms']['eioi'])
    torch.testing.assert_close(on['loss'], off['loss'] + more)


@pytest.mark.parametrize('cls, width', [
    (Late, None), (LMF, None), (LFDNN, 6 + 4 + 5), (TFN, 7 * 5 * 6), (MAGBERT, 32), (MulT, 48),
    (MISA, 48), (SelfMM, 32 + 6 + 4), (TETFN, 48), (ALMT, 8)])
def test_figures_find_the_fused_vectors(cls, width):
    model, batch = tiny_baseline(cls).eval(), tiny_batch()
    vectors = model.fused(batch, model.predict)
    assert vectors is None if width is None else vectors.shape == (3, width)
    weights, row, column = model.views(alone(batch, 0), model.predict)['last layer']
    assert weights.shape == (9, 9) and row == column == 'text token'
    torch.testing.assert_close(weights.sum(1), torch.ones(9))


def test_mag_says_how_frames_meet_the_text():
    k = tiny_knobs(MAGBERT, modalities=['vision'], resample='words')
    assert MAGBERT.needs_words(k) and not MAGBERT.needs_words(tiny_knobs(MAGBERT))
    assert MAGBERT.notes(k, TinyCorpus()) == [
        "vision: a median of 8 frames a clip, brought to the text's tokens (resample='words')"]
    assert MulT.notes(tiny_knobs(MulT), TinyCorpus()) == []


def test_the_control_adds_and_cannot_fuse():
    """ Changing the text changes the score by the same amount whatever is heard and seen. """
    model, batch = tiny_baseline(Late).eval(), tiny_batch()
    other = batch | dict(tokens=batch['tokens'].flip(0) % 60)
    swapped = {name: v.flip(0) for name, v in batch.items() if name.startswith(('audio', 'vision'))}
    with torch.no_grad():
        here = model.predict(other)['pred'] - model.predict(batch)['pred']
        there = model.predict(other | swapped)['pred'] - model.predict(batch | swapped)['pred']
    torch.testing.assert_close(here, there)
    assert here.abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------
# Against stored arrays

def vectors_state(w):
    """ MMSA's names for TFN and LMF -> ours. """
    ours = {}
    for name, v in w.items():
        name = name.removeprefix('w.').replace('audio_subnet', 'audio')
        name = name.replace('video_subnet', 'vision').replace('text_subnet.rnn', 'text_net.lstm')
        name = name.replace('text_subnet.linear_1', 'text_net.out')
        for i in (1, 2, 3):
            name = name.replace(f'.linear_{i}', f'.layers.{i - 1}')
            name = name.replace(f'post_fusion_layer_{i}', f'head.layers.{i - 1}')
        ours[name] = v
    return ours


def read_frames(z):
    """ The arrays' batch: all steps real, one (mean) frame of audio and video. """
    batch = {}
    for m in ('text', 'audio', 'vision'):
        x = z['in_' + m]
        batch |= {m: x, m + '_len': torch.full((len(x),), x.shape[1]),
                  m + '_mask': torch.ones(x.shape[:2], dtype=torch.bool)}
    return batch


def load_port(cls, w, **knobs):
    """ The system on hidden states of width 8, with the weights of a port. """
    k = tiny_knobs(cls, text_features='frozen', **knobs)
    model = cls.assemble(k, TinyCorpus(), None, Ends(), 8).eval()
    own = model.state_dict()
    counts = {n: t for n, t in own.items() if n.endswith('num_batches_tracked')}
    model.load_state_dict({n: w[n] for n in own if n in w} | counts)
    return model


def check_port(model, z):
    """ The three vectors and the score are the port's; returns what the model gave. """
    batch = read_frames(z)
    with torch.no_grad():
        for got, name in zip(model.vectors(z['in_text'], batch), 'avt'):
            torch.testing.assert_close(got, z[f'out_Feature_{name}'], rtol=0, atol=TOLERANCE)
        out = model.run(batch)
    torch.testing.assert_close(out['pred'], z['out_M'][:, 0], rtol=0, atol=TOLERANCE)
    return out


@needs_golden
def test_tfn_is_mmsas():
    z, _ = golden('mmsa_tfn.npz', '')
    w = vectors_state({name: v for name, v in z.items() if name.startswith('w.')})
    model = load_port(TFN, w, sub_widths=[6, 4, 3], text_out=5, post_width=4)
    out = check_port(model, z)
    torch.testing.assert_close(out['tensor'], z['out_Feature_f'], rtol=0, atol=TOLERANCE)


@needs_golden
def test_lmf_is_mmsas():
    z, _ = golden('mmsa_lmf.npz', '')
    w = vectors_state({name: v for name, v in z.items() if name.startswith('w.')})
    for theirs, ours in (('audio', 'audio'), ('video', 'vision'), ('text', 'text')):
        w['factors.' + ours] = w.pop(theirs + '_factor')[..., 0]
    w['fusion_bias'] = w['fusion_bias'][0]
    check_port(load_port(LMF, w, sub_widths=[6, 4, 3], text_out=3, lmf_rank=3), z)


@needs_golden
def test_mag_is_mmsas():
    z, _ = golden('mmsa_mag.npz', '')
    mag = MAG(dict(audio=4, vision=6), 10, float(z['beta_shift']), 0.5).eval()
    names = {'W_hv': 'gates.vision', 'W_ha': 'gates.audio', 'W_v': 'values.vision',
             'W_a': 'values.audio', 'LayerNorm': 'norm'}
    w = {}
    for key, v in z.items():
        if key.startswith('w.'):
            name, kind = key[2:].split('.')
            w[f'{names[name]}.{kind}'] = v
    mag.load_state_dict(w)
    with torch.no_grad():
        out = mag(z['in_text'], dict(audio=z['in_audio'], vision=z['in_vision']))
    torch.testing.assert_close(out, z['out'], rtol=0, atol=TOLERANCE)


class NoPositions(CrossStack):
    """ MMSA's MulT: no positions. """
    def enter(self, x):
        return x.shape[-1] ** 0.5 * x


def future(parent):
    """ The release's mask: key j is hidden from query i where j - i > |M - L|. """
    class Masked(parent):
        def visible(self, x, y_mask):
            L, M = x.shape[1], y_mask.shape[1]
            return torch.arange(M) - torch.arange(L)[:, None] <= abs(M - L)
    return Masked


def stack_state(z):
    """ The names of MulT's release for a stack -> ours. """
    names = {'fc1': 'up', 'fc2': 'down', 'layer_norms.0': 'norm_1', 'layer_norms.1': 'norm_2',
             'self_attn.out_proj': 'out'}
    w = {}
    for key, v in z.items():
        if not key.startswith('w.'):
            continue
        name = key[2:]
        if name.startswith('layer_norm.'):
            name = name.replace('layer_norm.', 'norm.')
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if 'in_proj_' in name:
            where, kind = name.split('self_attn.in_proj_')
            w[f'{where}q.{kind}'], w[f'{where}kv.{kind}'] = v[:6], v[6:]
        else:
            w[name] = v
    return w


@needs_golden
@pytest.mark.parametrize('case, kind', [
    ('nomask', NoPositions), ('mask', future(NoPositions)), ('mask_pos', future(CrossStack))])
def test_the_crossmodal_stack_is_mults(case, kind):
    z, _ = golden('mmsa_crossmodal_encoder.npz', case + '.')
    w = stack_state(z)
    x, y = (z[name].transpose(0, 1) for name in ('in_query', 'in_keyvalue'))
    x_real, y_real = (torch.ones(t.shape[:2], dtype=torch.bool) for t in (x, y))
    found = []
    for n_heads in (1, 2, 3, 6):  # the arrays do not say how many heads: only one number can fit
        stack = kind(6, n_heads, 2).eval()
        stack.load_state_dict(w)
        with torch.no_grad():
            cross, own = stack(x, y, y_real), stack(x, x, x_real)
        gaps = [float((a - z[name].transpose(0, 1)).abs().max())
                for a, name in ((cross, 'out_cross'), (own, 'out_self'))]
        if max(gaps) <= TOLERANCE:
            found.append(n_heads)
    assert len(found) == 1


# --------------------------------------------------------------------------------------------------
# The ports' bugs

def test_lmfs_fusion_weights_train_and_text_dropout_works():
    model, batch = tiny_baseline(LMF, sub_dropouts=[0.5, 0.0, 0.0]).train(), tiny_batch()
    model(batch)['loss'].backward()
    assert model.fusion_weights.grad.abs().sum() > 0 and model.fusion_bias.grad.abs().sum() > 0
    x = torch.randn(3, 9, 32)
    once, again = (model.text_net(x, batch['text_len']) for _ in range(2))
    assert not torch.equal(once, again)
    model.eval()
    assert torch.equal(*(model.text_net(x, batch['text_len']) for _ in range(2)))


def test_tfns_range_is_the_corpus():
    for low, high in ((-1, 1), (-3, 3), (0, 4)):
        model = tiny_baseline(TFN, TinyCorpus(label_range=(low, high))).eval()
        for bias, limit in ((50.0, high), (-50.0, low)):
            model.head.layers[2].bias.data.fill_(bias)
            assert (model.predict(tiny_batch())['pred'] - limit).abs().max() < 1e-4


def test_mult_knows_where_a_step_is():
    """ Two frames of audio in the other order: another score. Without positions and with kernels of
    1 it would be the same. """
    model, batch = tiny_baseline(MulT, kernels=[1, 1, 1]).eval(), tiny_batch()
    turned = batch | dict(audio=batch['audio'].clone())
    turned['audio'][0, [3, 9]] = batch['audio'][0, [9, 3]]
    with torch.no_grad():
        gap = model.predict(batch)['pred'] - model.predict(turned)['pred']
    assert gap[0].abs() > 1e-5


def test_misa_reads_audio_and_video_to_their_own_ends():
    """ The text has 9 tokens, the audio 20 frames: the last one counts. Against PyTorch's packed
    bidirectional LSTM. """
    model, batch = tiny_baseline(MISA).eval(), tiny_batch()
    other = batch | dict(audio=batch['audio'].clone())
    other['audio'][0, 19] += 1
    with torch.no_grad():
        gap = model.predict(batch)['pred'] - model.predict(other)['pred']
    assert gap[0].abs() > 1e-6
    x, n, net = batch['audio'][[0, 2]], batch['audio_len'][[0, 2]], model.audio
    both = torch.nn.LSTM(5, 5, batch_first=True, bidirectional=True)
    ahead, back = net.lstms[0].state_dict(), net.lstms[1].state_dict()
    both.load_state_dict(ahead | {name + '_reverse': v for name, v in back.items()})
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True)
    _, (h, _) = both(packed)
    got = net(x, n)
    torch.testing.assert_close(got[:, :5], h[0])
    torch.testing.assert_close(got[:, 10:15], h[1])


def test_tetfns_audio_and_video_meet_through_the_text():
    """ What audio looks at is video after a look at the text, step by step of the video (9 tokens,
    20 and 11 frames). """
    model, batch, seen = tiny_baseline(TETFN).eval(), tiny_batch(), {}

    def watch(name):
        def note(_, args):
            seen[name] = args[0].shape[1], args[1].shape[1]
        return note

    for name, stack in model.cross.items():
        stack.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model.predict(batch)
    assert seen == dict(
        text_from_audio=(9, 20), text_from_vision=(9, 11), audio_from_text=(20, 9),
        vision_from_text=(11, 9), guided_audio=(20, 9), guided_vision=(11, 9),
        audio_from_guided=(20, 11), vision_from_guided=(11, 20))


def test_misas_distances_by_hand():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # only the mean differs, by 2 in both features
    assert cmd(x, x) == 0 and float(cmd(x, x + 2)) == pytest.approx(8 ** 0.5, abs=1e-5)
    # second moments 1 and 4, fourth 1 and 16
    assert float(cmd(x, 2 * x)) == pytest.approx(3 + 15)
    assert float(orthogonality(x, x)) == pytest.approx(1.0)
    assert float(orthogonality(x, x.flip(1))) == pytest.approx(1.0)
    y = torch.tensor([[0.0, 1.0], [0.0, 1.0]])  # constant: centred, it is nothing
    assert float(orthogonality(x, y)) == 0
    z = x.clone().requires_grad_()
    (cmd(z, z.detach()) + orthogonality(z, y)).backward()
    assert z.grad.isfinite().all()


def test_own_labels_by_hand():
    """ Eqs. 9-14 in plain Python: three clips, features on a line; positive centre 2, negative -1.
    """
    labels = OwnLabels(4, dict(fused=1, text=1), high=3.0)
    index, y = torch.tensor([0, 1, 2]), torch.tensor([2.0, 1.0, -1.0])
    fused = torch.tensor([[2.0], [2.0], [-1.0]])
    text = torch.tensor([[3.0], [1.0], [-1.0]])
    assert torch.equal(labels.of('text', index, y), y)  # not seen yet
    labels.start(index, y)
    labels.update(index, dict(fused=fused, text=text), epoch=1)
    assert labels['text'].tolist() == [2.0, 1.0, -1.0, 0.0]  # epoch 1 gathers
    look = dict(fused=torch.tensor([[1.0], [1.5], [0.0]]),
                text=torch.tensor([[1.0], [0.5], [-0.5]]))
    labels.update(index, look, epoch=3)

    def side(x):
        return (abs(x + 1) - abs(x - 2)) / (abs(x - 2) + 1e-8)

    for i in range(3):
        d_f, d_t = side(float(look['fused'][i])), side(float(look['text'][i]))
        own = float(y[i])
        new = 0.5 * own * d_t / (d_f + 1e-8) + 0.5 * (own + d_t - d_f)
        new = min(3.0, max(-3.0, new))
        assert float(labels['text'][i]) == pytest.approx(2 / 4 * own + 2 / 4 * new, abs=1e-5)
    assert labels['fused'].tolist()[:3] == y.tolist() and float(labels['text'][3]) == 0
    labels.start(index, y)  # seen before: nothing starts over
    assert float(labels['text'][1]) not in (0.0, 1.0)
    assert torch.equal(labels.of('text', index, y), labels['text'][index])


def test_own_labels_stay_where_all_labels_have_one_sign():
    """ Labels of [0, 4] have no negative centre. """
    labels = OwnLabels(3, dict(fused=1, text=1), high=4.0)
    index = torch.tensor([0, 1, 2])
    look = dict(fused=torch.tensor([[1.0], [1.5], [0.0]]),
                text=torch.tensor([[1.0], [0.5], [-0.5]]))
    labels.start(index, torch.tensor([2.0, 1.0, 1.0]))
    for epoch in (1, 2):
        labels.update(index, look, epoch)
    assert labels['text'].tolist() == [2.0, 1.0, 1.0]


def test_own_labels_count_from_the_next_step_on():
    """ A step's loss is of the labels before it, in each micro-batch; evaluation has the corpus's.
    """
    model = tiny_baseline(SelfMM).train()
    batch = tiny_batch() | dict(label=torch.tensor([2.0, -1.0, 0.5]))
    for epoch in range(3):
        batch['epoch'] = torch.tensor(epoch)
        before = {m: model.labels[m].clone() for m in model.labels.streams}
        torch.manual_seed(5)
        out = model(batch)
        torch.manual_seed(5)  # the same dropout
        scores = model.predict(batch)
        for m in model.labels.streams:
            y = before[m][:3] if epoch else batch['label']
            wanted = (torch.tanh((y - batch['label']).abs()) * (scores[m] - y).abs()).mean()
            torch.testing.assert_close(out['terms'][m], wanted)
        model.after_step(batch, out)
        moved = not torch.equal(model.labels['text'][:3], batch['label'])
        assert moved == (epoch > 0)
    terms = model.eval()(batch)['terms']
    assert all(terms[m] == 0 for m in model.labels.streams)


def test_accumulated_gradients_are_never_dropped(corpora, tmp_path):
    """ 120 clips in batches of 16 with 3 a step: 8 batches, 3 steps, the last of 2 batches; the
    ports throw those away. """
    train('config/baseline_misa.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run',
          '--batch_size=16', '--accumulate=3', '--epochs=1', '--device=cpu', '--lm_vocab=60')
    lines = (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()
    assert json.loads(lines[-1])['step'] == 3


# --------------------------------------------------------------------------------------------------
# Through train.py

@pytest.mark.parametrize('system', BASELINES)
def test_trains_killed_and_resumed_to_the_same_bits(system, corpora, tmp_path):
    """ And eval.py reads it back from its files; the labels that Self-MM and TETFN made are in the
    checkpoint. """
    flags = [f'--data_dir={corpora}', *TINY, '--max_steps=10', '--save_interval=2', '--epochs=2',
             '--accumulate=1']
    config = f'config/baseline_{system}.py'
    train(config, *flags, f'--out_dir={tmp_path}/whole')
    before = json.loads((tmp_path / 'whole' / 'result.json').read_text())['test']
    evaluation.rerun(str(tmp_path / 'whole'))
    after = json.loads((tmp_path / 'whole' / 'result.json').read_text())['test']
    assert after == pytest.approx(before, abs=1e-5, nan_ok=True)

    with killed_in_batch(7):
        train(config, *flags, f'--out_dir={tmp_path}/killed')
    train(config, *flags, f'--out_dir={tmp_path}/killed', '--resume=True')
    same_run(tmp_path / 'whole', tmp_path / 'killed')


def test_frozen_text_is_hugging_faces_and_computed_once(tmp_path):
    """ Of a BERT and of a GPT-2; a second call reads the file; another model in its place is
    another file. """
    tokens, features = [[5, 6, 7, 8], [9], [10, 11]], tmp_path / 'features'
    for kind, hf in (('bert', tiny_bert()), ('gpt2', tiny_lm())):
        hf.save_pretrained(tmp_path / kind)
        hidden, mark = frozen_text(str(tmp_path / kind), tokens, str(features))
        assert hidden.dtype == np.float16 and len(hidden) == 7 and isinstance(hidden, np.memmap)
        base = getattr(hf, 'base_model', hf)
        with torch.no_grad():
            theirs = torch.cat([base(torch.tensor([t])).last_hidden_state[0] for t in tokens])
        ours = torch.from_numpy(np.array(hidden)).float()
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        files = {f: f.stat().st_mtime_ns for f in features.iterdir()}
        assert frozen_text(str(tmp_path / kind), tokens, str(features))[1] == mark
        assert files == {f: f.stat().st_mtime_ns for f in features.iterdir()}
    tiny_bert(seed=3).save_pretrained(tmp_path / 'bert')
    assert frozen_text(str(tmp_path / 'bert'), tokens, str(features))[1] != mark
    with pytest.raises(ModelError, match='could not be loaded'):
        frozen_text('no/such', tokens, str(features))
    with pytest.raises(ModelError, match='a text of 50 tokens is past the 40 positions'):
        frozen_text(str(tmp_path / 'bert'), [[5] * 50], str(features))
    from transformers import OPTConfig
    with pytest.raises(ModelError, match='how wide its hidden states are'):
        width_of(OPTConfig(hidden_size=32, word_embed_proj_dim=16))


def config_knobs(system, dataset):
    """ The knobs of a run of the config of a baseline. """
    known, annotations = known_knobs(SCRIPT, SYSTEMS, system)
    argv = [str(HERE / f'config/baseline_{system}.py'), f'--dataset={dataset}']
    return run_knobs(argv, COMMON, annotations, SYSTEMS)[1]


@pytest.mark.parametrize('system', BASELINES)
def test_configs_hold_the_knobs_of_their_system(system):
    """ Every config of a baseline has the data sets of the facts, with knobs that its system reads
    and that do not contradict each other. """
    for dataset in ('toy', 'mosi', 'mosei', 'sims', 'simsv2', 'minilm'):
        k = config_knobs(system, dataset)
        assert k['dataset'] == dataset and k['system'] == system
        assert SYSTEMS[system].check(k) == []


def test_a_dataset_that_is_not_there_gets_a_sentence():
    with pytest.raises(SystemExit, match="there is no dataset 'mosie' .* it has toy, mosi"):
        train('config/baseline_tfn.py', '--dataset=mosie')
    with pytest.raises(SystemExit, match='and config/crosssent_toy.py has none'):
        train('config/crosssent_toy.py', '--dataset=mosi')


@pytest.mark.parametrize('flags, sentence', [
    (['--label=emotion', '--select=wf1'], 'classes'),
    (['--late_streams=text,video'], "'video' is none of text, audio, vision"),
    (['--sub_widths=5,5'], 'must be 3 numbers'),
    (['--kernels=5,5,5'], 'is a knob of mult, tetfn, not of'),
    (['--sub_dropouts=0.1,0.1,1.0'], r'must be in \[0, 1\)'),
    (['--text_features=froze'], 'is none of tuned, frozen'),
    (['--text_features=frozen', '--text_pool=mean'], 'is for an --lm= that exists')])
def test_what_a_baseline_cannot_take_gets_a_sentence(flags, sentence, corpora, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train('config/baseline_late.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run',
              *TINY, *flags)
