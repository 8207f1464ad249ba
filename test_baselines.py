"""
The systems that the papers compare with: their forwards against stored arrays, and the bugs of the known ports as tests.

    python -m pytest -q test_baselines.py
"""
import json

import numpy as np
import pytest
import torch

import data
import eval as evaluation
from baselines import BASELINES, CrossStack, MAG, OwnLabels, build_baseline, cmd, orthogonality
from configurator import knobs_of, read_config
from lm import ModelError, TextEncoder, frozen_text, width_of
from test_crosssent import Ends, tiny_bert
from test_parity import TOLERANCE, golden, needs_golden
from test_smoke import HERE, tiny_batch, tiny_lm
from test_trust import TINY, Killed, same_run, train

KNOBS = dict(text_features='tuned', text_pool='first', resample='linear', dropout=0.0, sub_widths=[8, 6, 4], sub_dropouts=[0.0] * 3, text_out=5, post_width=7,
             late_streams=['text', 'audio', 'vision'], lmf_rank=3, mag_beta=1.0, fusion_width=8, fusion_heads=2, fusion_layers=2, kernels=[3, 1, 5], attn_dropout=0.0,
             attn_dropout_audio=0.0, attn_dropout_vision=0.0, max_text_len=20, res_dropout=0.0, embed_dropout=0.0, misa_diff=0.1, misa_sim=0.3, misa_rebuild=1.0, head_widths=[8, 5, 4, 3], head_dropouts=[0.0] * 4, almt_tokens=3,
             lr_encoder=0.5, lr_audio=2.0, lr_vision=3.0, lr_factors=4.0, weight_mpr=0.0, weight_eioi=0.0, label='label')


class TinyCorpus:
    widths, n_clips, labels = dict(audio=5, vision=7), dict(train=6), dict(label=dict(kind='regression', range=[-3, 3]))


def tiny_baseline(system, widths=None, label_range=(-3, 3), **knobs):
    torch.manual_seed(1)
    corpus, c = TinyCorpus(), KNOBS | dict(system=system) | knobs
    if widths is not None: corpus.widths = widths
    corpus.labels = dict(label=dict(kind='regression', range=list(label_range)))
    encoder = TextEncoder(tiny_bert()) if c['text_features'] == 'tuned' else None
    return build_baseline(c, corpus, encoder, 32, Ends())


def alone(batch, i):
    """ Clip i of a batch, without its padding. """
    one = {k: t[i:i + 1] for k, t in batch.items() if k != 'targets'}
    for m, of in (('tokens', 'text'), ('audio', 'audio'), ('vision', 'vision'), ('text', 'text')):
        n = max(1, int(batch[of + '_len'][i]))
        for k in {m, of + '_mask'} & set(one): one[k] = one[k][:, :n]
    return one


# ---------------------------------------------------------------------------------------------------------
# All of them

@pytest.mark.parametrize('system', BASELINES)
def test_every_weight_moves_and_padding_is_never_read(system):
    """ A clip alone gives what it gives in company, with or without audio, video, or more than a word: MMSA's LF-DNN, TFN, LMF,
    MulT and TETFN read padding, its MISA cuts audio and video at the text's length. Then three steps. """
    model, batch = tiny_baseline(system), tiny_batch()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        together = model.eval().predict({k: v for k, v in batch.items() if k != 'label'})
        assert all(v.shape == (3,) for v in together.values())
        for i in range(3): torch.testing.assert_close(model.predict(alone(batch, i))['pred'][0], together['pred'][i], rtol=0, atol=1e-5)
    model.train()
    groups = model.param_groups()
    scales = {n: g['lr_scale'] for g in groups for n in g['names']}
    assert sorted(scales) == sorted(start) and len(scales) == sum(len(g['params']) for g in groups)
    assert all(s == {'encoder': 0.5, 'audio': 2.0, 'vision': 3.0, 'factors': 4.0}.get(n.split('.')[0], 1.0) for n, s in scales.items())
    optimizer = torch.optim.AdamW([p for g in groups for p in g['params']], lr=1e-2)
    for seed in range(3):
        batch = tiny_batch(seed) | dict(label=torch.tensor([1.0, -1.0, 0.0]), epoch=torch.tensor(seed))
        optimizer.zero_grad(); model(batch)['loss'].backward(); optimizer.step()
    still = {n for n, p in model.named_parameters() if p.grad is None or torch.equal(p, start[n])}
    # softmax does not see a key's bias; a pre-norm stream of one batch's ReLUs may sleep, so no more is forgiven than this
    assert {n for n in still if not n.endswith('key.bias')} == set()


@pytest.mark.parametrize('system', BASELINES)
def test_a_batch_of_one_trains(system):
    """ BatchNorm has no statistics of one clip, MISA's centred vectors are zero there, Self-MM has no clip of the other side. """
    model = tiny_baseline(system).train()
    for i in range(3):
        out = model(alone(tiny_batch(), i) | dict(epoch=torch.tensor(i)))
        out['loss'].backward()
        assert out['loss'].isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('system', sorted(set(BASELINES) - {'mag'}))
def test_frozen_hidden_states_are_the_encoder_that_does_not_learn(system):
    tuned, batch = tiny_baseline(system, text_pool='mean').eval(), tiny_batch()
    frozen = tiny_baseline(system, text_features='frozen', text_pool='mean').eval()
    frozen.load_state_dict({k: v for k, v in tuned.state_dict().items() if not k.startswith('encoder.')})
    with torch.no_grad():
        batch['text'] = tuned.encoder(batch['tokens'], batch['text_mask'])
        torch.testing.assert_close(frozen.predict(batch)['pred'], tuned.predict(batch)['pred'])


@pytest.mark.parametrize('system', sorted(set(BASELINES) - {'late'}))
def test_a_corpus_without_video_is_refused(system):
    with pytest.raises(ModelError, match=f"system='{system}' needs audio and vision, and this corpus has no vision"): tiny_baseline(system, dict(audio=5))
    assert tiny_baseline('late', {}, late_streams=['text']).eval().predict(tiny_batch())['pred'].shape == (3,)
    with pytest.raises(ModelError, match='this corpus has no audio'): tiny_baseline('late', {})
    heard = {k: v for k, v in tiny_batch().items() if k == 'index' or k.startswith('audio')}   # a unimodal system reads nothing else
    assert list(tiny_baseline('late', dict(audio=5), late_streams=['audio']).eval().predict(heard)) == ['pred', 'audio']


@pytest.mark.parametrize('knobs, sentence', [(dict(system='mag', text_features='frozen'), "wants text_features='tuned'"), (dict(system='mag', resample='none'), 'adds a frame to each token'),
                                             (dict(system='mult', fusion_heads=3), 'does not divide fusion_width=8'),
                                             (dict(system='misa', max_text_len=41), 'past the 40 positions'), (dict(system='selfmm', text_features='frozen'), "take text_pool='mean'")])
def test_knobs_that_do_not_fit(knobs, sentence):
    with pytest.raises(ModelError, match=sentence): tiny_baseline(**knobs)


@pytest.mark.parametrize('system', BASELINES)
def test_the_ordinal_losses_are_two_knobs_here_too(system):
    """ They add what they weigh, ramped, to any of them; off, the loss is the system's own. """
    batch = tiny_batch() | dict(epoch=torch.tensor(0), label=torch.tensor([2.0, -1.0, 0.5]))
    knobs = dict(mpr_gap=0.5, mpr_margin=0.1, mpr_slope=0.5, eioi_band=0.1, eioi_power=1.0)
    plain, both = tiny_baseline(system).train(), tiny_baseline(system, weight_mpr=0.3, weight_eioi=0.2, **knobs).train()
    torch.manual_seed(5); off = plain(batch)   # the same dropout in both
    torch.manual_seed(5); on = both(batch | dict(ramp=torch.tensor(0.5)))
    assert not {'mpr', 'eioi'} & set(off['terms']) and on['terms']['mpr'] > 0 and on['terms']['eioi'] > 0
    torch.testing.assert_close(on['loss'], off['loss'] + 0.5 * (0.3 * on['terms']['mpr'] + 0.2 * on['terms']['eioi']))


def test_the_control_adds_and_cannot_fuse():
    """ Changing the text changes the score by the same amount whatever is heard and seen. """
    model, batch = tiny_baseline('late').eval(), tiny_batch()
    other = batch | dict(tokens=batch['tokens'].flip(0) % 60)
    swap = lambda b: b | {k: batch[k].flip(0) for k in batch if k.startswith(('audio', 'vision'))}
    with torch.no_grad():
        here = model.predict(other)['pred'] - model.predict(batch)['pred']
        there = model.predict(swap(other))['pred'] - model.predict(swap(batch))['pred']
    torch.testing.assert_close(here, there)
    assert here.abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------
# Against stored arrays

def vectors_state(w):
    """ MMSA's names for TFN and LMF -> ours. """
    ours = {}
    for k, v in w.items():
        k = k.removeprefix('w.').replace('audio_subnet', 'audio').replace('video_subnet', 'vision')
        k = k.replace('text_subnet.rnn', 'text_net.lstm').replace('text_subnet.linear_1', 'text_net.out')
        for i in (1, 2, 3): k = k.replace(f'.linear_{i}', f'.layers.{i - 1}').replace(f'post_fusion_layer_{i}', f'head.layers.{i - 1}')
        ours[k] = v
    return ours


def read_frames(z):
    """ The arrays' batch: all steps real, one (mean) frame of audio and video. """
    batch = {}
    for m in ('text', 'audio', 'vision'):
        x = z['in_' + m]
        batch |= {m: x, m + '_len': torch.full((len(x),), x.shape[1]), m + '_mask': torch.ones(x.shape[:2], dtype=torch.bool)}
    return batch


def port(system, D, c):
    args = dict(tfn=((-3, 3),)).get(system, ())
    return BASELINES[system](None, D, dict(audio=5, vision=7), KNOBS | dict(system=system, text_features='frozen') | c, *args).eval()


@needs_golden
@pytest.mark.parametrize('system', ['tfn', 'lmf'])
def test_tfn_and_lmf_are_mmsas(system):
    z, _ = golden(f'mmsa_{system}.npz', '')
    w = vectors_state({k: v for k, v in z.items() if k.startswith('w.')})
    if system == 'tfn': c = dict(sub_widths=[6, 4, 3], text_out=5, post_width=4)
    else:
        c = dict(sub_widths=[6, 4, 3], text_out=3, lmf_rank=3)
        for theirs, ours in (('audio', 'audio'), ('video', 'vision'), ('text', 'text')): w['factors.' + ours] = w.pop(theirs + '_factor')[..., 0]
        w['fusion_bias'] = w['fusion_bias'][0]
    model = port(system, 8, c)
    own = model.state_dict()
    model.load_state_dict({k: w[k] for k in own if k in w} | {k: v for k, v in own.items() if k.endswith('num_batches_tracked')})
    with torch.no_grad():
        batch = read_frames(z)
        for got, name in zip(model.vectors(z['in_text'], batch), 'avt'): torch.testing.assert_close(got, z[f'out_Feature_{name}'], rtol=0, atol=TOLERANCE)
        out = model.run(batch)
    torch.testing.assert_close(out['pred'], z['out_M'][:, 0], rtol=0, atol=TOLERANCE)
    if system == 'tfn': torch.testing.assert_close(out['tensor'], z['out_Feature_f'], rtol=0, atol=TOLERANCE)


@needs_golden
def test_mag_is_mmsas():
    z, _ = golden('mmsa_mag.npz', '')
    mag = MAG(dict(audio=4, vision=6), 10, float(z['beta_shift']), 0.5).eval()
    names = {'W_hv': 'gates.vision', 'W_ha': 'gates.audio', 'W_v': 'values.vision', 'W_a': 'values.audio', 'LayerNorm': 'norm'}
    w = {}
    for k, v in z.items():
        if not k.startswith('w.'): continue
        name, kind = k[2:].split('.')
        w[f'{names[name]}.{kind}'] = v
    mag.load_state_dict(w)
    with torch.no_grad(): out = mag(z['in_text'], dict(audio=z['in_audio'], vision=z['in_vision']))
    torch.testing.assert_close(out, z['out'], rtol=0, atol=TOLERANCE)


class NoPositions(CrossStack):
    """ MMSA's MulT: no positions. """
    def enter(self, x): return x.shape[-1] ** 0.5 * x


def future(parent):
    """ The release's mask: key j is hidden from query i where j - i > |M - L|. """
    class Masked(parent):
        def visible(self, x, y_mask):
            L, M = x.shape[1], y_mask.shape[1]
            return torch.arange(M) - torch.arange(L)[:, None] <= abs(M - L)
    return Masked


@needs_golden
@pytest.mark.parametrize('case, kind', [('nomask', NoPositions), ('mask', future(NoPositions)), ('mask_pos', future(CrossStack))])
def test_the_crossmodal_stack_is_mults(case, kind):
    z, _ = golden('mmsa_crossmodal_encoder.npz', case + '.')
    names = {'fc1': 'up', 'fc2': 'down', 'layer_norms.0': 'norm_1', 'layer_norms.1': 'norm_2', 'self_attn.out_proj': 'out'}
    w = {}
    for k, v in z.items():
        if not k.startswith('w.'): continue
        k = k[2:].replace('layer_norm.', 'norm.') if k.startswith('w.layer_norm.') else k[2:]
        for theirs, ours in names.items(): k = k.replace(theirs, ours)
        if 'in_proj_' in k:
            part = k.split('self_attn.in_proj_')
            w[f'{part[0]}q.{part[1]}'], w[f'{part[0]}kv.{part[1]}'] = v[:6], v[6:]
        else: w[k] = v
    found = []
    for n_heads in (1, 2, 3, 6):   # the arrays do not say how many heads: only one number of them can fit
        stack = kind(6, n_heads, 2).eval()
        stack.load_state_dict(w)
        x, y = (z[k].transpose(0, 1) for k in ('in_query', 'in_keyvalue'))
        real = lambda t: torch.ones(t.shape[:2], dtype=torch.bool)
        with torch.no_grad(): cross, own = stack(x, y, real(y)), stack(x, x, real(x))
        gap = max(float((a - z[k].transpose(0, 1)).abs().max()) for a, k in ((cross, 'out_cross'), (own, 'out_self')))
        if gap <= TOLERANCE: found.append(n_heads)
    assert len(found) == 1


# ---------------------------------------------------------------------------------------------------------
# The ports' bugs

def test_lmfs_fusion_weights_train_and_text_dropout_works():
    model, batch = tiny_baseline('lmf', sub_dropouts=[0.5, 0.0, 0.0]).train(), tiny_batch()
    model(batch)['loss'].backward()
    assert model.fusion_weights.grad.abs().sum() > 0 and model.fusion_bias.grad.abs().sum() > 0
    x = torch.randn(3, 9, 32)
    once, again = (model.text_net(x, batch['text_len']) for _ in range(2))
    assert not torch.equal(once, again) and torch.equal(*(model.eval().text_net(x, batch['text_len']) for _ in range(2)))


def test_tfns_range_is_the_corpus():
    for low, high in ((-1, 1), (-3, 3), (0, 4)):
        model, batch = tiny_baseline('tfn', label_range=(low, high)).eval(), tiny_batch()
        model.head.layers[2].bias.data.fill_(50.0)
        assert (model.predict(batch)['pred'] - high).abs().max() < 1e-4
        model.head.layers[2].bias.data.fill_(-50.0)
        assert (model.predict(batch)['pred'] - low).abs().max() < 1e-4


def test_mult_knows_where_a_step_is():
    """ Two frames of audio in the other order: another score. Without positions and with kernels of 1 it would be the same. """
    model, batch = tiny_baseline('mult', kernels=[1, 1, 1]).eval(), tiny_batch()
    turned = batch | dict(audio=batch['audio'].clone())
    turned['audio'][0, [3, 9]] = batch['audio'][0, [9, 3]]
    with torch.no_grad(): assert (model.predict(batch)['pred'] - model.predict(turned)['pred'])[0].abs() > 1e-5


def test_misa_reads_audio_and_video_to_their_own_ends():
    """ The text has 9 tokens, the audio 20 frames: the last one counts. Against PyTorch's packed bidirectional LSTM. """
    model, batch = tiny_baseline('misa').eval(), tiny_batch()
    other = batch | dict(audio=batch['audio'].clone())
    other['audio'][0, 19] += 1
    with torch.no_grad(): assert (model.predict(batch)['pred'] - model.predict(other)['pred'])[0].abs() > 1e-6
    x, n, net = batch['audio'][[0, 2]], batch['audio_len'][[0, 2]], model.audio
    both = torch.nn.LSTM(5, 5, batch_first=True, bidirectional=True)
    both.load_state_dict({k: v for k, v in net.lstms[0].state_dict().items()} | {k + '_reverse': v for k, v in net.lstms[1].state_dict().items()})
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True)
    _, (h, _) = both(packed)
    got = net(x, n)
    torch.testing.assert_close(got[:, :5], h[0]); torch.testing.assert_close(got[:, 10:15], h[1])


def test_tetfns_audio_and_video_meet_through_the_text():
    """ What audio looks at is video after a look at the text, step by step of the video (9 tokens, 20 and 11 frames). """
    model, batch, seen = tiny_baseline('tetfn').eval(), tiny_batch(), {}
    for name, stack in model.cross.items(): stack.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: (args[0].shape[1], args[1].shape[1])}))
    with torch.no_grad(): model.predict(batch)
    assert seen == dict(text_from_audio=(9, 20), text_from_vision=(9, 11), audio_from_text=(20, 9), vision_from_text=(11, 9),
                        guided_audio=(20, 9), guided_vision=(11, 9), audio_from_guided=(20, 11), vision_from_guided=(11, 20))


def test_misas_distances_by_hand():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert cmd(x, x) == 0 and float(cmd(x, x + 2)) == pytest.approx(8 ** 0.5, abs=1e-5)   # only the mean differs, by 2 in both features
    assert float(cmd(x, 2 * x)) == pytest.approx(3 + 15)                                  # second moments 1 and 4, fourth 1 and 16
    assert float(orthogonality(x, x)) == pytest.approx(1.0) and float(orthogonality(x, x.flip(1))) == pytest.approx(1.0)
    y = torch.tensor([[0.0, 1.0], [0.0, 1.0]])                                            # constant: centred, it is nothing
    assert float(orthogonality(x, y)) == 0
    z = x.clone().requires_grad_(); (cmd(z, z.detach()) + orthogonality(z, y)).backward()
    assert z.grad.isfinite().all()


def test_own_labels_by_hand():
    """ Eqs. 9-14 in plain Python: three clips, features on a line; positive centre 2, negative -1. """
    labels = OwnLabels(4, dict(fused=1, text=1), high=3.0)
    index, y = torch.tensor([0, 1, 2]), torch.tensor([2.0, 1.0, -1.0])
    fused, text = torch.tensor([[2.0], [2.0], [-1.0]]), torch.tensor([[3.0], [1.0], [-1.0]])
    labels.start(index, y)
    labels.update(index, dict(fused=fused, text=text), epoch=1)
    assert labels['text'].tolist() == [2.0, 1.0, -1.0, 0.0]                               # epoch 1 gathers
    look = dict(fused=torch.tensor([[1.0], [1.5], [0.0]]), text=torch.tensor([[1.0], [0.5], [-0.5]]))
    labels.update(index, look, epoch=3)
    for i in range(3):
        side = lambda x: (abs(x + 1) - abs(x - 2)) / (abs(x - 2) + 1e-8)
        d_f, d_t, own = side(float(look['fused'][i])), side(float(look['text'][i])), float(y[i])
        new = min(3.0, max(-3.0, 0.5 * own * d_t / (d_f + 1e-8) + 0.5 * (own + d_t - d_f)))
        assert float(labels['text'][i]) == pytest.approx(2 / 4 * own + 2 / 4 * new, abs=1e-5)
    assert labels['fused'].tolist()[:3] == y.tolist() and float(labels['text'][3]) == 0
    labels.start(index, y)                                                                # seen before: nothing starts over
    assert float(labels['text'][1]) not in (0.0, 1.0)
    one_sided = OwnLabels(3, dict(fused=1, text=1), high=4.0)                             # labels of [0, 4]: no negative centre
    one_sided.start(index, y.abs())
    for epoch in (1, 2): one_sided.update(index, look, epoch)
    assert one_sided['text'].tolist() == [2.0, 1.0, 1.0]


def test_accumulated_gradients_are_never_dropped(corpora, tmp_path):
    """ 120 clips in batches of 16 with 3 a step: 8 batches, 3 steps, the last of 2 batches; the ports throw those away. """
    train('config/baseline_misa.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run', '--batch_size=16', '--accumulate=3', '--epochs=1', '--device=cpu', '--lm_vocab=60')
    last = [json.loads(line) for line in open(tmp_path / 'run' / 'log.jsonl')][-1]
    assert last['step'] == 3


# ---------------------------------------------------------------------------------------------------------
# Through train.py

@pytest.mark.parametrize('system', BASELINES)
def test_trains_killed_and_resumed_to_the_same_bits(system, corpora, tmp_path, monkeypatch):
    """ And eval.py reads it back from its files; the labels that Self-MM and TETFN made are in the checkpoint. """
    real, left = data.get_batch, [0]
    flags = [f'--data_dir={corpora}', *TINY, '--max_steps=10', '--save_interval=2', '--epochs=2', '--accumulate=1']
    config = f'config/baseline_{system}.py'
    train(config, *flags, f'--out_dir={tmp_path}/whole')
    before = json.load(open(tmp_path / 'whole' / 'result.json'))['test']
    evaluation.rerun(str(tmp_path / 'whole'))
    assert json.load(open(tmp_path / 'whole' / 'result.json'))['test'] == pytest.approx(before, abs=1e-5, nan_ok=True)
    def dying(*a, **k):
        left[0] -= 1
        if left[0] == 0: raise Killed
        return real(*a, **k)
    monkeypatch.setattr(data, 'get_batch', dying)
    left[0] = 7
    with pytest.raises(Killed): train(config, *flags, f'--out_dir={tmp_path}/killed')
    left[0] = -1
    train(config, *flags, f'--out_dir={tmp_path}/killed', '--resume=True')
    same_run(tmp_path / 'whole', tmp_path / 'killed')


def test_frozen_text_is_hugging_faces_and_computed_once(tmp_path):
    """ Of a BERT and of a GPT-2; a second call reads the file; another model in its place is another file. """
    tokens = [[5, 6, 7, 8], [9], [10, 11]]
    for kind, hf in (('bert', tiny_bert()), ('gpt2', tiny_lm())):
        hf.save_pretrained(tmp_path / kind)
        hidden, mark = frozen_text(str(tmp_path / kind), tokens, str(tmp_path / 'features'))
        assert hidden.dtype == np.float16 and len(hidden) == 7 and isinstance(hidden, np.memmap)
        base = getattr(hf, 'base_model', hf)
        with torch.no_grad(): theirs = torch.cat([base(torch.tensor([t])).last_hidden_state[0] for t in tokens])
        torch.testing.assert_close(torch.from_numpy(np.array(hidden)).float(), theirs, rtol=2e-3, atol=2e-3)
        files = {f: f.stat().st_mtime_ns for f in (tmp_path / 'features').iterdir()}
        assert frozen_text(str(tmp_path / kind), tokens, str(tmp_path / 'features'))[1] == mark
        assert files == {f: f.stat().st_mtime_ns for f in (tmp_path / 'features').iterdir()}
    tiny_bert(seed=3).save_pretrained(tmp_path / 'bert')
    assert frozen_text(str(tmp_path / 'bert'), tokens, str(tmp_path / 'features'))[1] != mark
    with pytest.raises(ModelError, match='could not be loaded'): frozen_text('no/such', tokens, str(tmp_path / 'features'))
    with pytest.raises(ModelError, match='a text of 50 tokens is past the 40 positions'): frozen_text(str(tmp_path / 'bert'), [[5] * 50], str(tmp_path / 'features'))
    from transformers import OPTConfig
    with pytest.raises(ModelError, match='how wide its hidden states are'): width_of(OPTConfig(hidden_size=32, word_embed_proj_dim=16))


def test_a_datasets_settings_go_over_the_files_and_under_the_flags():
    """ Every config of a baseline has the four data sets of the facts, with knobs that exist. """
    known = knobs_of(HERE / 'train.py')
    for system in BASELINES:
        for dataset in ('toy', 'mosi', 'mosei', 'sims', 'simsv2', 'minilm'):
            new = read_config(HERE / f'config/baseline_{system}.py', known, dataset)
            assert new['dataset'] == dataset and new['system'] == system
    with pytest.raises(SystemExit, match="there is no dataset 'mosie' .* it has toy, mosi"):
        train('config/baseline_tfn.py', '--dataset=mosie')
    with pytest.raises(SystemExit, match='and config/crosssent_toy.py has none'): train('config/crosssent_toy.py', '--dataset=mosi')


def test_what_a_baseline_cannot_take_gets_a_sentence(corpora, tmp_path):
    for flags, sentence in ((['--label=emotion', '--select=wf1'], 'is one of classes'), (['--late_streams=text,video'], "may hold 'text', 'audio' and 'vision'"), (['--kernels=5,5'], 'must be 3 numbers'),
                            (['--sub_dropouts=0.1,0.1,1.0'], r'must be in \[0, 1\)'), (['--text_features=froze'], 'is none of tuned, frozen'), (['--text_features=frozen'], 'with an --lm= that exists')):
        with pytest.raises(SystemExit, match=sentence): train('config/baseline_late.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run', *TINY, *flags)
