"""
The baselines: forward passes against stored arrays, and tests that bugs of MMSA are absent.

    python -m pytest -q tests/test_baselines.py
"""
import json
import re

import numpy as np
import pytest
import torch

import eval as evaluation
from adapters import EncoderLayer, last_step
from baselines.all import BASELINES
from baselines.almt import ALMT
from baselines.crossmodal import CrossStack
from baselines.mag import MAG, MAGBERT
from baselines.misa import MISA, cmd, orthogonality
from baselines.mmim import MMIM, Entropy, contrast, covariance
from baselines.mult import MulT
from baselines.selfmm import TETFN, SelfLabelled, SelfMM, UnimodalLabels
from baselines.vectors import LFDNN, LMF, TFN, Late
from configurator import (
    class_annotations,
    class_knobs,
    declared_knobs,
    known_knobs,
    run_knobs,
    value_errors,
)
from fakes import (
    HERE,
    TINY,
    TOLERANCE,
    TinyTokenizer,
    clip_alone,
    golden,
    killed_in_batch,
    needs_golden,
    same_run,
    tiny_batch,
    tiny_bert,
    tiny_lm,
    train,
)
from lm import EncoderKnobs, TextEncoder
from losses import OrdinalKnobs
from model import SYSTEMS
from run.errors import ModelError
from run.frozen_text import frozen_text, width_of

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
                           emotion=dict(kind='classes', names=['joy', 'anger', 'fear']))

    def lengths(self, split, stream):
        return np.array([4, 8, 8])


def tiny_knobs(cls, **knobs):
    """ The knobs of a small run of a system; `knobs` overrides some of them. """
    known = COMMON | class_knobs(cls) | dict(system=NAMES[cls])
    assert set(knobs) <= set(known)
    return known | {name: v for name, v in SMALL.items() if name in known} | knobs


def tiny_baseline(cls, corpus=None, **knobs):
    k, corpus = tiny_knobs(cls, **knobs), corpus or TinyCorpus()
    torch.manual_seed(1)
    if 'text' not in cls.modalities_read(k):
        return cls.assemble(k, corpus, None, None)
    if cls.frozen_features(k):
        return cls.assemble(k, corpus, None, TinyTokenizer(), 32)
    return cls.assemble(k, corpus, TextEncoder(tiny_bert()), TinyTokenizer())


# --------------------------------------------------------------------------------------------------
# Every system

@each_system
def test_padding_does_not_change_predictions_and_every_weight_trains(cls):
    """ The prediction of a clip alone is that of the clip in a padded batch, also for clips without
    audio, without video, or with one word. (MMSA's LF-DNN, TFN, LMF, MulT and TETFN read padding,
    its MISA cuts audio and video at the text's length.) Then three training steps. """
    model, batch = tiny_baseline(cls), tiny_batch()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model.eval()
        together = model.predict({name: v for name, v in batch.items() if name != 'label'})
        assert all(v.shape == (3,) for v in together.values())
        for i in range(3):
            pred = model.predict(clip_alone(batch, i))['pred'][0]
            torch.testing.assert_close(pred, together['pred'][i], rtol=0, atol=1e-5)
    model.train()
    groups = model.param_groups()
    scales = {n: g['lr_scale'] for g in groups for n in g['names']}
    assert sorted(scales) == sorted(start)
    assert len(scales) == sum(len(g['params']) for g in groups)
    expected = {name.removeprefix('lr_'): v for name, v in model.k.items() if name in SMALL}
    assert all(s == expected.get(n.split('.')[0], 1.0) for n, s in scales.items())
    optimizer = torch.optim.AdamW([p for g in groups for p in g['params']], lr=1e-2)
    for seed in range(3):
        batch = tiny_batch(seed) | dict(label=torch.tensor([1.0, -1.0, 0.0]))
        batch['epoch'] = torch.tensor(seed)
        optimizer.zero_grad()
        out = model(batch)
        out['loss'].backward()
        model.after_step(batch, out)
        optimizer.step()
    unmoved = {n for n, p in model.named_parameters() if p.grad is None or torch.equal(p, start[n])}
    # the bias of a key cancels in softmax, so its gradient is zero
    assert {n for n in unmoved if not n.endswith('key.bias')} == set()


@each_system
def test_every_knob_is_read(cls):
    """ A knob that the code does not read would have no effect. """
    class RecordingDict(dict):
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

    read = set()
    k = RecordingDict(tiny_knobs(cls))
    cls.frozen_features(k)
    model = cls.assemble(k, TinyCorpus(), TextEncoder(tiny_bert()), TinyTokenizer()).train()
    model.param_groups()
    model(tiny_batch() | dict(epoch=torch.tensor(0)))
    parts = [*EncoderKnobs.__mro__, *OrdinalKnobs.__mro__]
    shared = {name for part in parts for name in vars(part)}
    # building a new encoder reads dropout, also for systems whose own code does not
    assert set(class_knobs(cls)) - shared - read <= {'dropout', 'text_features'}


@each_system
def test_a_batch_of_one_trains(cls):
    """ With one clip BatchNorm has no variance, MISA's centred vectors are zero, and Self-MM has no
    clip of the opposite polarity. """
    model = tiny_baseline(cls).train()
    for i in range(3):
        batch = clip_alone(tiny_batch(), i) | dict(epoch=torch.tensor(i))
        out = model(batch)
        out['loss'].backward()
        model.after_step(batch, out)
        assert out['loss'].isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_system
def test_forward_changes_no_state_but_batch_norms(cls):
    """ Other buffers change in after_step only. """
    model = tiny_baseline(cls).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batch = tiny_batch() | dict(epoch=torch.tensor(1))
    out = model(batch)
    assert out['loss'].ndim == 0
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert all('norm' in n for n in changed)
    model.after_step(batch, out)
    after = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} - changed
    assert bool(after) == issubclass(cls, (SelfLabelled, MMIM))
    assert cls.one_process == bool(changed | after)


@pytest.mark.parametrize('cls', [c for c in NAMES if c is not MAGBERT])
def test_frozen_hidden_states_predict_the_same_as_the_encoder(cls):
    pool = dict(text_pool='mean') if 'text_pool' in class_knobs(cls) else {}
    tuned, batch = tiny_baseline(cls, **pool).eval(), tiny_batch()
    frozen = tiny_baseline(cls, text_features='frozen', **pool).eval()
    state = tuned.state_dict()
    frozen.load_state_dict({n: t for n, t in state.items() if not n.startswith('encoder.')})
    with torch.no_grad():
        batch['text'] = tuned.encoder(batch['tokens'], batch['text_mask'], batch['text_rows'])
        torch.testing.assert_close(frozen.predict(batch)['pred'], tuned.predict(batch)['pred'])
    one = clip_alone(batch, 0)
    weights = tuned.views(one, tuned.predict)['last layer'][0]  # [T,T]
    assert weights.shape == 2 * one['tokens'].shape[1:]
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    assert frozen.views(one, frozen.predict) == {}


@pytest.mark.parametrize('cls', [c for c in NAMES if c is not Late])
def test_a_corpus_without_video_is_refused(cls):
    message = f"system='{NAMES[cls]}' needs audio and vision, but this corpus has no vision: "
    with pytest.raises(ModelError, match=message + "choose another corpus"):
        tiny_baseline(cls, TinyCorpus(dict(audio=5)))


def test_late_fusion_of_one_stream_reads_that_stream_alone():
    model = tiny_baseline(Late, TinyCorpus({}), late_streams=['text']).eval()
    assert model.predict(tiny_batch())['pred'].shape == (3,)
    with pytest.raises(ModelError, match='lists audio, but this corpus has no audio'):
        tiny_baseline(Late, TinyCorpus({}))
    audio_only = {name: v for name, v in tiny_batch().items()
             if name == 'index' or name.startswith('audio')}
    model = tiny_baseline(Late, TinyCorpus(dict(audio=5)), late_streams=['audio']).eval()
    assert list(model.predict(audio_only)) == ['pred', 'audio']


def test_late_fusion_without_text_loads_no_text_model(tmp_path):
    """ The LM in the knobs does not exist, and is not looked for. """
    k = tiny_knobs(Late, late_streams=['vision', 'audio'], modalities=['audio'], lm='no/such')
    assert Late.modalities_read(k) == ['audio'] and not Late.frozen_features(k)
    model, tokenizer = Late.build(k, TinyCorpus(), str(tmp_path))
    assert tokenizer is None and model.encoder is None and model.views({}, None) == {}
    assert Late.modalities_read(tiny_knobs(Late)) == ['text', 'audio', 'vision']
    assert LFDNN.modalities_read(tiny_knobs(LFDNN)) == ['text', 'audio', 'vision']


@pytest.mark.parametrize('features', ['tuned', 'frozen'])
def test_a_pretrained_text_model_is_built(features, tmp_path):
    """ From a folder. With frozen hidden states only its width is read, and no weights. """
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
    (SelfMM, dict(text_features='frozen', lm='gpt2'), "needs text_pool='mean'"),
    (SelfMM, dict(head_widths=[1, 2, 3]), 'must be a list of 4 numbers'),
    (TFN, dict(text_features='frozen', lm='new'), "needs a pretrained model in --lm="),
    (Late, dict(late_streams=['text', 'video']), "'video' is none of text, audio, vision"),
    (Late, dict(late_streams=[]), "lists no stream that is read"),
    (Late, dict(late_streams=['audio'], modalities=['vision']), "lists no stream that is read"),
    (Late, dict(sub_dropouts=[0.1, 0.1, 1.0]), r'must be in \[0, 1\)')])
def test_wrong_knobs_give_one_sentence_each(cls, knobs, sentence):
    k = tiny_knobs(cls, **knobs)
    assert value_errors(tiny_knobs(cls), class_annotations(cls)) + cls.check(tiny_knobs(cls)) == []
    wrong = value_errors(k, class_annotations(cls)) or cls.check(k)
    assert len(wrong) == 1
    assert re.search(sentence, wrong[0])


def test_knobs_that_do_not_fit_the_encoder_or_the_corpus_are_refused():
    with pytest.raises(ModelError, match='past the 40 positions'):
        tiny_baseline(MISA, max_text_len=41)
    with pytest.raises(ModelError, match='weight_mpr compares scores'):
        tiny_baseline(TFN, label='emotion', weight_mpr=0.1)


@pytest.mark.parametrize('cls', [c for c in NAMES if not issubclass(c, SelfLabelled)])
def test_classes_have_probabilities_and_a_cross_entropy(cls):
    model, batch = tiny_baseline(cls, label='emotion').eval(), tiny_batch()
    batch |= dict(label=torch.tensor([1, 0, 2]), epoch=torch.tensor(0))
    with torch.no_grad():
        out = model.predict(batch)
        loss = model(batch)
    assert out['prob'].shape == (3, 3) and set(out) == {'pred', 'prob'}
    torch.testing.assert_close(out['prob'].sum(1), torch.ones(3))
    assert torch.equal(out['pred'], out['prob'].argmax(1).float())
    right = out['prob'][torch.arange(3), batch['label']]  # [B]
    torch.testing.assert_close(loss['terms']['task'], -right.log().mean())


def test_late_fusion_of_classes_adds_logits():
    """ The ratio of two probabilities is a product over the streams. """
    model, batch = tiny_baseline(Late, label='emotion').eval(), tiny_batch()
    other = batch | {name: v.flip(0) for name, v in batch.items() if name.startswith('vision')}
    swapped = dict(tokens=batch['tokens'].flip(0) % 60)

    def log_ratio(batch):
        prob = model.predict(batch)['prob']  # [B,K]
        return (prob[:, 0] / prob[:, 1]).log()  # [B]

    with torch.no_grad():
        change = log_ratio(batch | swapped) - log_ratio(batch)
        change_other = log_ratio(other | swapped) - log_ratio(other)
    torch.testing.assert_close(change, change_other, rtol=1e-3, atol=1e-5)
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize('cls', [SelfMM, TETFN])
def test_generated_labels_refuse_classes_with_the_reason(cls):
    message = (f"label='emotion' has classes, and system='{NAMES[cls]}' cannot learn them, because "
               "the labels that it generates need a sign, positive or negative: choose a label "
               "with scores")
    with pytest.raises(ModelError, match=message):
        tiny_baseline(cls, label='emotion')


@each_system
def test_ordinal_losses_add_to_the_loss_by_their_ramped_weights(cls):
    """ With weights of 0, the default, the loss has no ordinal terms. """
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


@each_system
def test_coral_replaces_the_task_loss_alone(cls):
    batch = tiny_batch() | dict(epoch=torch.tensor(1), label=torch.tensor([2.0, -1.0, 0.5]))
    plain, coral = tiny_baseline(cls).train(), tiny_baseline(cls, level_step=0.5).train()
    torch.manual_seed(5)  # the same dropout in all
    score = coral.run(batch)['pred']  # [B]
    losses = []
    for model in (plain, coral):
        torch.manual_seed(5)
        losses.append(model(batch))
    off, on = losses
    above = batch['label'][:, None] > torch.arange(-2.75, 3, 0.5)  # [B,K-1]
    p = (score[:, None] - torch.arange(-2.75, 3, 0.5)).sigmoid()  # [B,K-1]
    task = -torch.where(above, p, 1 - p).log().mean()
    torch.testing.assert_close(on['terms']['task'], task)
    torch.testing.assert_close(on['loss'] - task, off['loss'] - off['terms']['task'])
    assert {name for name in on['terms'] if on['terms'][name] != off['terms'][name]} == {'task'}
    with pytest.raises(ModelError, match='level_step compares scores|needs a sign|need a sign'):
        tiny_baseline(cls, level_step=0.5, label='emotion')


@each_system
def test_terms_are_not_weighted_yet_and_the_loss_is_their_weighted_sum(cls):
    """ So a weight of 0 leaves a term as it is, and takes it from the loss. """
    batch = tiny_batch() | dict(epoch=torch.tensor(1), label=torch.tensor([2.0, -1.0, 0.5]))
    names = [name for name in class_knobs(cls) if name.removeprefix('misa_') in
             ('diff', 'sim', 'rebuild') or name.removeprefix('mmim_') in ('cpc', 'bound')]
    outs = []
    for changes in (dict(), dict.fromkeys(names, 0.0)):
        model = tiny_baseline(cls, **changes).train()
        torch.manual_seed(5)  # the same dropout in both
        outs.append(model(batch))
    (on, off), k = outs, tiny_knobs(cls)
    assert on['terms'] == off['terms']
    sign = dict(mmim_bound=-1)  # the bound is maximised
    more = sum(sign.get(name, 1) * k[name] * on['terms'][name.split('_')[1]] for name in names)
    torch.testing.assert_close(on['loss'], off['loss'] + more)


@pytest.mark.parametrize('cls, width', [
    (Late, None), (LMF, None), (LFDNN, 6 + 4 + 5), (TFN, 7 * 5 * 6), (MAGBERT, 32), (MulT, 48),
    (MISA, 48), (SelfMM, 32 + 6 + 4), (TETFN, 48), (ALMT, 8), (MMIM, 7)])
def test_fused_vectors_and_attention_are_available_for_figures(cls, width):
    model, batch = tiny_baseline(cls).eval(), tiny_batch()
    vectors = model.fused(batch, model.predict)
    assert vectors is None if width is None else vectors.shape == (3, width)
    weights, row, column = model.views(clip_alone(batch, 0), model.predict)['last layer']
    assert weights.shape == (9, 9) and row == column == 'text token'
    torch.testing.assert_close(weights.sum(1), torch.ones(9))


def test_mag_notes_how_frames_are_resampled():
    k = tiny_knobs(MAGBERT, modalities=['vision'], resample='words')
    assert MAGBERT.needs_words(k) and not MAGBERT.needs_words(tiny_knobs(MAGBERT))
    assert MAGBERT.notes(k, TinyCorpus()) == [
        "vision: a median of 8 frames per clip, resampled onto the text tokens (resample='words')"]
    assert MulT.notes(tiny_knobs(MulT), TinyCorpus()) == []


def test_late_fusion_has_no_interaction_between_streams():
    """ Changing the text changes the score by the same amount for any audio and video. """
    model, batch = tiny_baseline(Late).eval(), tiny_batch()
    other = batch | dict(tokens=batch['tokens'].flip(0) % 60)
    swapped = {name: v.flip(0) for name, v in batch.items() if name.startswith(('audio', 'vision'))}
    with torch.no_grad():
        change = model.predict(other)['pred'] - model.predict(batch)['pred']
        change_swapped = (model.predict(other | swapped)['pred']
                          - model.predict(batch | swapped)['pred'])
    torch.testing.assert_close(change, change_swapped)
    assert change.abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------
# Against stored arrays

def vectors_state(w):
    """ Weights of MMSA's TFN and LMF -> the same by our names. """
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
    """ The stored inputs as a batch: no padding, one (mean) frame of audio and of video. """
    batch = {}
    for m in ('text', 'audio', 'vision'):
        x = z['in_' + m]
        batch |= {m: x, m + '_len': torch.full((len(x),), x.shape[1]),
                  m + '_mask': torch.ones(x.shape[:2], dtype=torch.bool)}
    return batch


def load_mmsa(cls, w, **knobs):
    """ A system on hidden states of width 8, with MMSA's weights w. """
    k = tiny_knobs(cls, text_features='frozen', **knobs)
    model = cls.assemble(k, TinyCorpus(), None, TinyTokenizer(), 8).eval()
    own = model.state_dict()
    counts = {n: t for n, t in own.items() if n.endswith('num_batches_tracked')}
    model.load_state_dict({n: w[n] for n in own if n in w} | counts)
    return model


def check_against_mmsa(model, z):
    """ Asserts that the three vectors and the score are MMSA's; returns the model's output. """
    batch = read_frames(z)
    with torch.no_grad():
        for got, name in zip(model.vectors(z['in_text'], batch), 'avt'):
            torch.testing.assert_close(got, z[f'out_Feature_{name}'], rtol=0, atol=TOLERANCE)
        out = model.run(batch)
    torch.testing.assert_close(out['pred'], z['out_M'][:, 0], rtol=0, atol=TOLERANCE)
    return out


@needs_golden
def test_tfn_equals_mmsa():
    z, _ = golden('mmsa_tfn.npz', '')
    w = vectors_state({name: v for name, v in z.items() if name.startswith('w.')})
    model = load_mmsa(TFN, w, sub_widths=[6, 4, 3], text_out=5, post_width=4)
    out = check_against_mmsa(model, z)
    torch.testing.assert_close(out['tensor'], z['out_Feature_f'], rtol=0, atol=TOLERANCE)


@needs_golden
def test_lmf_equals_mmsa():
    z, _ = golden('mmsa_lmf.npz', '')
    w = vectors_state({name: v for name, v in z.items() if name.startswith('w.')})
    for theirs, ours in (('audio', 'audio'), ('video', 'vision'), ('text', 'text')):
        w['factors.' + ours] = w.pop(theirs + '_factor')[..., 0]
    w['fusion_bias'] = w['fusion_bias'][0]
    check_against_mmsa(load_mmsa(LMF, w, sub_widths=[6, 4, 3], text_out=3, lmf_rank=3), z)


@needs_golden
def test_mag_equals_mmsa():
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
    """ As in MMSA's MulT: no position embeddings. """
    def embed(self, x):
        return x.shape[-1] ** 0.5 * x


def masking_the_future(parent):
    """ As in MulT's release: key j is masked for query i if j - i > |M - L|. """
    class Masked(parent):
        def attention_mask(self, x, y_mask):
            L, M = x.shape[1], y_mask.shape[1]
            return torch.arange(M) - torch.arange(L)[:, None] <= abs(M - L)
    return Masked


def stack_state(z):
    """ Weights of a stack of MulT's release -> the same by our names. """
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


def attends_to_itself(stack, x, x_mask):
    """ The self-attention of a CrossStack at all steps, as in MulT's release: [B,L,d] -> [B,L,d]. """
    mask = stack.attention_mask(x, x_mask)  # [B,1,1,L]
    x = stack.embed(x)  # [B,L,d]
    for layer in stack.layers:
        x = layer(x, x, mask)  # [B,L,d]
    return stack.norm(x)


@needs_golden
@pytest.mark.parametrize('case, kind', [
    ('nomask', NoPositions), ('mask', masking_the_future(NoPositions)),
    ('mask_pos', masking_the_future(CrossStack))])
def test_cross_stack_equals_mult(case, kind):
    z, _ = golden('mmsa_crossmodal_encoder.npz', case + '.')
    w = stack_state(z)
    x, y = (z[name].transpose(0, 1) for name in ('in_query', 'in_keyvalue'))
    x_real, y_real = (torch.ones(t.shape[:2], dtype=torch.bool) for t in (x, y))
    fitting = []
    for n_heads in (1, 2, 3, 6):  # not stored with the arrays: exactly one number must fit
        stack = kind(6, n_heads, 2).eval()
        stack.load_state_dict(w)
        with torch.no_grad():
            cross, own = stack(x, y, y_real), attends_to_itself(stack, x, x_real)
        gaps = [float((a - z[name].transpose(0, 1)).abs().max())
                for a, name in ((cross, 'out_cross'), (own, 'out_self'))]
        if max(gaps) <= TOLERANCE:
            fitting.append(n_heads)
    assert len(fitting) == 1


def test_a_layer_that_is_read_at_some_steps_gives_what_the_whole_layer_gives_there():
    """ The last step of a CrossStack (MulT, TETFN), and the first n of an EncoderLayer (ALMT). """
    torch.manual_seed(0)
    x, lengths = torch.randn(4, 9, 6), torch.tensor([9, 1, 0, 5])
    mask = torch.arange(9) < lengths[:, None]  # [B,L]
    for n_layers in (1, 3):
        stack = CrossStack(6, 3, n_layers, attn_dropout=0.5, res_dropout=0.5).eval()
        whole = last_step(attends_to_itself(stack, x, mask), lengths)  # [B,d]
        torch.testing.assert_close(stack.at_last_step(x, mask, lengths), whole)
    layer = EncoderLayer(6, 3).eval()
    mask[2, 0] = True  # an EncoderLayer needs a real step
    for m in (mask, None):
        torch.testing.assert_close(layer(x, m, 4), layer(x, m)[:, :4])


# --------------------------------------------------------------------------------------------------
# Bugs of MMSA that are absent here

def test_lmf_trains_its_fusion_weights_and_drops_out_text():
    model, batch = tiny_baseline(LMF, sub_dropouts=[0.5, 0.0, 0.0]).train(), tiny_batch()
    model(batch)['loss'].backward()
    assert model.fusion_weights.grad.abs().sum() > 0 and model.fusion_bias.grad.abs().sum() > 0
    x = torch.randn(3, 9, 32)
    first, second = (model.text_net(x, batch['text_len']) for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(*(model.text_net(x, batch['text_len']) for _ in range(2)))


def test_tfn_predicts_in_the_label_range_of_the_corpus():
    for low, high in ((-1, 1), (-3, 3), (0, 4)):
        model = tiny_baseline(TFN, TinyCorpus(label_range=(low, high))).eval()
        for bias, limit in ((50.0, high), (-50.0, low)):
            model.head.layers[2].bias.data.fill_(bias)
            assert (model.predict(tiny_batch())['pred'] - limit).abs().max() < 1e-4


def test_mult_depends_on_the_order_of_frames():
    """ Swapping two audio frames changes the score. With kernels of 1 and without position
    embeddings it would not. """
    model, batch = tiny_baseline(MulT, kernels=[1, 1, 1]).eval(), tiny_batch()
    swapped = batch | dict(audio=batch['audio'].clone())
    swapped['audio'][0, [3, 9]] = batch['audio'][0, [9, 3]]
    with torch.no_grad():
        gap = model.predict(batch)['pred'] - model.predict(swapped)['pred']
    assert gap[0].abs() > 1e-5


def test_misa_reads_audio_to_its_own_length():
    """ The text has 9 tokens and the audio 20 frames; the last frame changes the score. Then the
    LSTM states are compared with PyTorch's packed bidirectional LSTM. """
    model, batch = tiny_baseline(MISA).eval(), tiny_batch()
    other = batch | dict(audio=batch['audio'].clone())
    other['audio'][0, 19] += 1
    with torch.no_grad():
        gap = model.predict(batch)['pred'] - model.predict(other)['pred']
    assert gap[0].abs() > 1e-6
    x, n, net = batch['audio'][[0, 2]], batch['audio_len'][[0, 2]], model.audio
    reference = torch.nn.LSTM(5, 5, batch_first=True, bidirectional=True)
    forward, backward = net.lstms[0].state_dict(), net.lstms[1].state_dict()
    reference.load_state_dict(forward | {name + '_reverse': v for name, v in backward.items()})
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True)
    _, (h, _) = reference(packed)
    got = net(x, n)
    torch.testing.assert_close(got[:, :5], h[0])
    torch.testing.assert_close(got[:, 10:15], h[1])


def test_tetfn_relates_audio_and_video_through_the_text():
    """ The lengths of queries and keys of each stack, for 9 tokens, 20 audio and 11 video frames:
    audio attends to video frames that have attended to the text, and the reverse. """
    model, batch, lengths = tiny_baseline(TETFN).eval(), tiny_batch(), {}

    def recorder(name):
        def record(_, args):
            lengths[name] = args[0].shape[1], args[1].shape[1]
        return record

    for name, stack in model.cross.items():
        stack.register_forward_pre_hook(recorder(name))
    with torch.no_grad():
        model.predict(batch)
    assert lengths == dict(
        text_from_audio=(9, 20), text_from_vision=(9, 11), audio_from_text=(20, 9),
        vision_from_text=(11, 9), guided_audio=(20, 9), guided_vision=(11, 9),
        audio_from_guided=(20, 11), vision_from_guided=(11, 20))


def test_misa_losses_equal_hand_computed_values():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # only the mean differs, by 2 in both features
    assert cmd(x, x) == 0 and float(cmd(x, x + 2)) == pytest.approx(8 ** 0.5, abs=1e-5)
    # second moments 1 and 4, fourth 1 and 16
    assert float(cmd(x, 2 * x)) == pytest.approx(3 + 15)
    assert float(orthogonality(x, x)) == pytest.approx(1.0)
    assert float(orthogonality(x, x.flip(1))) == pytest.approx(1.0)
    y = torch.tensor([[0.0, 1.0], [0.0, 1.0]])  # constant, so zero after centring
    assert float(orthogonality(x, y)) == 0
    z = x.clone().requires_grad_()
    (cmd(z, z.detach()) + orthogonality(z, y)).backward()
    assert z.grad.isfinite().all()


def test_unimodal_labels_equal_eqs_9_to_14_by_hand():
    """ Three clips with one-dimensional features; the positive centre is 2, the negative -1. """
    labels = UnimodalLabels(4, dict(fused=1, text=1), high=3.0)
    index, y = torch.tensor([0, 1, 2]), torch.tensor([2.0, 1.0, -1.0])
    fused = torch.tensor([[2.0], [2.0], [-1.0]])
    text = torch.tensor([[3.0], [1.0], [-1.0]])
    assert torch.equal(labels.lookup('text', index, y), y)  # not seen yet
    labels.add_clips(index, y)
    labels.update(index, dict(fused=fused, text=text), epoch=1)
    assert labels['text'].tolist() == [2.0, 1.0, -1.0, 0.0]  # epoch 1 only stores features
    features = dict(fused=torch.tensor([[1.0], [1.5], [0.0]]),
                    text=torch.tensor([[1.0], [0.5], [-0.5]]))
    labels.update(index, features, epoch=3)

    def relative_distance(x):
        return (abs(x + 1) - abs(x - 2)) / (abs(x - 2) + 1e-8)

    for i in range(3):
        d_f = relative_distance(float(features['fused'][i]))
        d_t = relative_distance(float(features['text'][i]))
        old = float(y[i])
        new = 0.5 * old * d_t / (d_f + 1e-8) + 0.5 * (old + d_t - d_f)
        new = min(3.0, max(-3.0, new))
        assert float(labels['text'][i]) == pytest.approx(2 / 4 * old + 2 / 4 * new, abs=1e-5)
    assert labels['fused'].tolist()[:3] == y.tolist() and float(labels['text'][3]) == 0
    labels.add_clips(index, y)  # seen before, so no label is reset
    assert float(labels['text'][1]) not in (0.0, 1.0)
    assert torch.equal(labels.lookup('text', index, y), labels['text'][index])


def test_unimodal_labels_stay_constant_if_all_labels_have_one_sign():
    """ Labels in [0, 4] have no negative centre. """
    labels = UnimodalLabels(3, dict(fused=1, text=1), high=4.0)
    index = torch.tensor([0, 1, 2])
    features = dict(fused=torch.tensor([[1.0], [1.5], [0.0]]),
                    text=torch.tensor([[1.0], [0.5], [-0.5]]))
    labels.add_clips(index, torch.tensor([2.0, 1.0, 1.0]))
    for epoch in (1, 2):
        labels.update(index, features, epoch)
    assert labels['text'].tolist() == [2.0, 1.0, 1.0]


def test_unimodal_labels_of_a_step_are_used_from_the_next_step_on():
    """ The loss of a step uses the labels from before it; evaluation uses the corpus labels. """
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
            expected = (torch.tanh((y - batch['label']).abs()) * (scores[m] - y).abs()).mean()
            torch.testing.assert_close(out['terms'][m], expected)
        model.after_step(batch, out)
        moved = not torch.equal(model.labels['text'][:3], batch['label'])
        assert moved == (epoch > 0)
    terms = model.eval()(batch)['terms']
    assert all(terms[m] == 0 for m in model.labels.streams)


def test_mmim_trains_q_by_its_likelihood_and_the_others_by_the_rest():
    model = tiny_baseline(MMIM).train()
    batch = tiny_batch() | dict(label=torch.tensor([1.0, -1.0, 0.0]), epoch=torch.tensor(0))
    terms = model(batch)['terms']
    weights = dict(model.named_parameters())
    of_q = {name for name in weights if name.startswith('q.')}

    def moved(loss):
        grads = torch.autograd.grad(loss, weights.values(), retain_graph=True, allow_unused=True)
        return {name for name, grad in zip(weights, grads) if grad is not None}

    assert moved(terms['q']) == of_q
    assert not moved(terms['task'] + terms['cpc'] + terms['bound']) & of_q
    assert {'audio.out.weight', 'vision.out.weight'} <= moved(terms['bound'])


def test_mmims_entropy_is_that_of_two_batches_with_a_gaussian_for_each_sign():
    torch.manual_seed(0)
    entropy, y = Entropy(8, 2, 5), torch.randn(2, 5, 8)  # 2 batches of 5 clips
    group = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 0, -1]])  # -1 is in neither
    entropy.remember(y[0], group[0])
    projected = torch.tanh(y @ entropy.weight.T).double()  # [2,5,2]
    expected = 0.0
    for i in (0, 1):
        members = projected[group == i].numpy()  # [4 or 5,2]
        sigma = np.cov(members.T, bias=True) + 1e-4 * np.eye(2)
        expected += 0.25 * np.log(np.linalg.det(sigma))
    assert float(entropy(y[1], group[1])) == pytest.approx(expected, abs=1e-4)
    entropy.remember(y[1][:2], group[1][:2])  # a smaller batch leaves nothing of the one before
    assert entropy.memory_group.tolist() == [1, 1, -1, -1, -1]
    nobody = torch.zeros(5, dtype=torch.bool)
    assert torch.equal(covariance(y[0], nobody), 1e-4 * torch.eye(8))


def test_mmims_contrast_by_hand():
    """ Vectors that point to their own prediction: cosines of 1 and 0, whatever their lengths. """
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    e = np.e
    assert float(contrast(x, 5 * x)) == pytest.approx(-np.log(e / (e + 1)))
    assert float(contrast(x, 5 * x.flip(0))) == pytest.approx(-np.log(1 / (e + 1)))


def test_the_last_incomplete_accumulation_is_a_step(corpora, tmp_path):
    """ 120 clips in batches of 16, 3 batches per step: 8 batches, so 3 steps, the last of 2
    batches. MMSA discards those two. """
    train('config/baseline_misa.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run',
          '--batch_size=16', '--accumulate=3', '--epochs=1', '--device=cpu', '--lm_vocab=60')
    lines = (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()
    assert json.loads(lines[-1])['step'] == 3


# --------------------------------------------------------------------------------------------------
# Through train.py

@pytest.mark.parametrize('system', BASELINES)
def test_a_killed_run_resumes_bitwise_and_eval_reads_it(system, corpora, tmp_path):
    """ This includes the labels that Self-MM and TETFN generate, which are in the checkpoint. """
    flags = [f'--data_dir={corpora}', *TINY, '--max_steps=10', '--save_interval=2', '--epochs=2',
             '--accumulate=1']
    config = f'config/baseline_{system}.py'
    train(config, *flags, f'--out_dir={tmp_path}/whole')
    before = json.loads((tmp_path / 'whole' / 'result.json').read_text())['test']
    evaluation.evaluate_again(str(tmp_path / 'whole'))
    after = json.loads((tmp_path / 'whole' / 'result.json').read_text())['test']
    assert after == pytest.approx(before, abs=1e-5, nan_ok=True)

    with killed_in_batch(7):
        train(config, *flags, f'--out_dir={tmp_path}/killed')
    train(config, *flags, f'--out_dir={tmp_path}/killed', '--resume=True')
    same_run(tmp_path / 'whole', tmp_path / 'killed')


def test_frozen_text_equals_hugging_face_and_is_computed_once(tmp_path):
    """ For a BERT and a GPT-2. A second call reads the stored file; another model in the same
    folder gets another file. """
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
    """ The knobs of a run of a baseline's config on one data set. """
    known, annotations = known_knobs(SCRIPT, SYSTEMS, system)
    argv = [str(HERE / f'config/baseline_{system}.py'), f'--dataset={dataset}']
    return run_knobs(argv, COMMON, annotations, SYSTEMS)[1]


@pytest.mark.parametrize('system', BASELINES)
def test_configs_have_all_data_sets_and_valid_knobs(system):
    for dataset in ('toy', 'mosi', 'mosei', 'sims', 'simsv2', 'minilm'):
        k = config_knobs(system, dataset)
        assert k['dataset'] == dataset and k['system'] == system
        assert SYSTEMS[system].check(k) == []


def test_an_unknown_dataset_is_refused_with_a_sentence():
    with pytest.raises(SystemExit, match="there is no dataset 'mosie' .* it has toy, mosi"):
        train('config/baseline_tfn.py', '--dataset=mosie')
    with pytest.raises(SystemExit, match='and config/crosssent_toy.py has none'):
        train('config/crosssent_toy.py', '--dataset=mosi')


@pytest.mark.parametrize('flags, sentence', [
    (['--label=emotion', '--select=wf1', '--weight_mpr=0.1'], 'has classes, which have no order'),
    (['--late_streams=text,video'], "'video' is none of text, audio, vision"),
    (['--sub_widths=5,5'], 'must be a list of 3 numbers'),
    (['--kernels=5,5,5'], 'is a knob of mult, tetfn, not of'),
    (['--sub_dropouts=0.1,0.1,1.0'], r'must be in \[0, 1\)'),
    (['--text_features=froze'], 'is none of tuned, frozen'),
    (['--text_features=frozen', '--text_pool=mean'], 'needs a pretrained model in --lm=')])
def test_train_py_refuses_wrong_flags_with_a_sentence(flags, sentence, corpora, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train('config/baseline_late.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run',
              *TINY, *flags)
