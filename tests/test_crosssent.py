"""
CrossSent: the fine-tuned encoder, GMRA, the ordinal losses, frames on tokens, zero-shot evaluation;
and CORAL, the control of the ordinal losses, in every system with a score.

    python -m pytest -q tests/test_crosssent.py
"""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import eval as evaluation
from adapters import GMRA, frames_on_tokens, resample_to_tokens
from configurator import declared_knobs, run_knobs
from crosssent import one_hot_codes
from data import Feed
from fakes import (
    HERE,
    KNOBS,
    TINY,
    TinyTokenizer,
    clip_alone,
    command,
    killed_in_batch,
    knobs_of_system,
    make_corpus,
    of_width,
    same_run,
    tiny_batch,
    tiny_bert,
    tiny_deepmlf,
    tiny_lm,
    train,
    without_checksums,
)
from lm import TextEncoder
from losses import OrdinalKnobs, RankLevels, eioi_loss, mpr_loss, ordinal_loss
from model import SYSTEMS, AVModel, CrossSent
from run.clips import Clips
from run.errors import ModelError

CROSS_KNOBS = knobs_of_system(
    CrossSent,
    system='crosssent',
    gmra_layer=2,
    gmra_mult=2.0,
    gmra_start='random',
    lr_encoder=0.5,
    dropout=0.0,
    max_text_len=20,
    weight_mpr=0.1,
    weight_eioi=0.1,
    eioi_band=0.1,
)


def tiny_crosssent(family='bert', widths=dict(audio=5, vision=7), **knobs):
    torch.manual_seed(1)
    return CrossSent(TextEncoder(tiny_bert(family)), TinyTokenizer(), widths, CROSS_KNOBS | knobs)


# -------------------------------------------------------------------------------------------------
# The encoder and GMRA


@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_the_encoder_equals_hugging_faces(family):
    """
    On the real tokens, with padding at the end. Other token ids in the padding change nothing,
    and its hidden states are zeros. Two calls of layers equal one.
    """
    hf = tiny_bert(family)
    tokens = torch.randint(4, 60, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(11) < torch.tensor([11, 7, 3])[:, None]
    rows = mask.flatten().nonzero()[:, 0]
    with torch.no_grad():
        theirs = hf(tokens, attention_mask=mask.long()).last_hidden_state
        encoder = TextEncoder(hf).eval()
        ours = encoder(tokens, mask, rows)
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            encoder(tokens.where(mask, 0), mask, rows)[mask], ours[mask], rtol=0, atol=1e-6
        )
        assert not ours[~mask].any()
        first = encoder.layers(encoder.embed(tokens), mask, rows, 0, 1)
        assert torch.equal(encoder.layers(first, mask, rows, 1), ours)


def test_other_models_and_impossible_knobs_are_refused():
    with pytest.raises(ModelError, match="'gpt2' is no encoder of the BERT or RoBERTa family"):
        TextEncoder(tiny_lm())
    for knobs, sentence in (
        (dict(gmra_layer=4), 'from 1 to 3'),
        (dict(max_text_len=41), 'past the 40 positions'),
    ):
        with pytest.raises(ModelError, match=sentence):
            tiny_crosssent(**knobs)
    for family in ('roberta', 'camembert'):  # their first position is the padding id + 1
        with pytest.raises(ModelError, match='past the 38 positions'):
            tiny_crosssent(family, max_text_len=39)
    # these have a BERT's parts and compute something else
    for family in ('roformer', 'megatron-bert', 'roberta-prelayernorm'):
        with pytest.raises(ModelError, match='is no encoder of the BERT'):
            TextEncoder(tiny_bert(family))


def test_an_encoder_that_fails_without_a_message_is_refused(monkeypatch):
    def fail(self):
        raise AssertionError

    monkeypatch.setattr(TextEncoder, 'gap', fail)
    with pytest.raises(ModelError, match='is no encoder of the BERT.*AssertionError'):
        TextEncoder(tiny_bert())


def test_gmra_has_the_papers_number_of_weights():
    """
    8.89 M in Table 4: width 768, audio and video as codes of 16 clusters and padding, a residual
    adapter of four times the width.
    """
    with torch.device('meta'):
        gmra = GMRA(dict(audio=17, vision=17), 768, 768, 12, mult=4.0)
    assert sum(p.numel() for p in gmra.parameters()) == 8_888_064


def test_the_identity_start_equals_the_encoder_without_gmra():
    batch = tiny_batch()
    with_it = tiny_crosssent(gmra_start='identity').eval()
    without = tiny_crosssent(gmra_layer=0).eval()
    without.head.load_state_dict(with_it.head.state_dict())
    assert torch.equal(with_it.predict(batch)['pred'], without.predict(batch)['pred'])
    random_start = tiny_crosssent().eval()
    assert not torch.equal(random_start.predict(batch)['pred'], without.predict(batch)['pred'])


@pytest.mark.parametrize(
    'knobs',
    [
        dict(),
        dict(resample='mean'),
        dict(resample='none'),
        dict(gmra_concat='features'),
        dict(text_pool='mean'),
        dict(gmra_width=16, gmra_heads=2),
        dict(gmra_layer=0),
        dict(gmra_start='identity'),
    ],
)
def test_two_steps_change_every_weight_and_padding_has_no_effect(knobs):
    """
    After an evaluation and two steps every weight has a gradient and a new value. One clip has no
    audio, one no video. A batch of one equals the padded batch.
    """
    model, batch = tiny_crosssent(**knobs), tiny_batch()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        together = model.eval().predict({k: v for k, v in batch.items() if k != 'label'})['pred']
        for i in range(3):
            alone = model.predict(clip_alone(batch, i))['pred'][0]
            torch.testing.assert_close(alone, together[i], rtol=0, atol=1e-5)
    model.train()
    for m in model.encoder.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    groups = model.param_groups()
    assert sorted(n for g in groups for n in g['names']) == sorted(start)
    assert {g['lr_scale'] for g in groups} == {0.5, 1.0}
    assert all(g['lr_scale'] == 0.5 for g in groups for n in g['names'] if n.startswith('encoder.'))
    optimizer = torch.optim.AdamW([p for g in groups for p in g['params']], lr=1e-2)
    for seed in range(2):
        optimizer.zero_grad()
        model(tiny_batch(seed) | dict(label=torch.tensor([1.0, -1.0, 0.0])))['loss'].backward()
        optimizer.step()
    unchanged = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or p.grad.abs().sum() == 0 or torch.equal(p, start[n])
    ]
    # softmax cancels a key's bias
    assert [n for n in unchanged if not n.endswith(('key.bias', 'k_proj.bias'))] == []


def test_resample_to_tokens_by_hand():
    """
    The frames 0 1 2 3 and one special token in front. Linear: 3 words get 0, 1.5, 3; 2 words 0, 3;
    one word 0. Without frames: zeros.
    """
    x = torch.arange(4.0)[None, :, None].repeat(4, 1, 1)
    n, words = torch.tensor([4, 4, 4, 0]), torch.tensor([3, 2, 1, 3])
    assert resample_to_tokens(x, n, words, 1, 5, 'linear')[..., 0].tolist() == [
        [0, 0, 1.5, 3, 0],
        [0, 0, 3, 0, 0],
        [0, 0, 0, 0, 0],
        [0] * 5,
    ]
    assert resample_to_tokens(x, n, words, 1, 5, 'mean')[..., 0].tolist() == [
        [0, 0.5, 1.5, 2.5, 0],
        [0, 0.5, 2.5, 0, 0],
        [0, 1.5, 0, 0, 0],
        [0] * 5,
    ]


def test_sub_words_get_the_frame_of_their_word():
    model, batch = tiny_crosssent(resample='words'), tiny_batch()
    batch['word'] = torch.tensor(
        [[-1, 0, 0, 1, 2, 2, 2, 30, -1], [-1, 0, 1, -1] + [-1] * 5, [-1] * 9]
    )
    x, mask = frames_on_tokens(batch, ['audio'], model.ends, model.k['resample'])['audio']
    # word 30 has no frame, and clip 1 has none at all
    assert mask[0].tolist() == [False, True, True, True, True, True, True, False, False]
    assert torch.equal(x[0, 4], batch['audio'][0, 2])
    assert torch.equal(x[0, 6], batch['audio'][0, 2])
    assert not mask[1].any()
    assert (x[1] == 0).all()


def words_run(tmp_path, **change):
    """ Trains two steps with resample='words' on a corpus of make_corpus. """
    save_tiny_bert(tmp_path)
    flag = make_corpus(tmp_path, 'aligned', **change)
    train('config/crosssent_mosi.py', flag, f'--lm={tmp_path}/bert', f'--out_dir={tmp_path}/run',
          f'--data_dir={tmp_path}/data', '--device=cpu', '--max_steps=2', '--max_text_len=30')


@pytest.mark.parametrize('first', [0.0, 1.0])
def test_an_aligned_file_may_begin_with_a_zero_frame(first, tmp_path, capsys):
    """ 'the film was good' has 4 words, and each clip 5 frames. """
    def frames(split, x):
        x = np.ones((len(x), 6, x.shape[2]), 'f4')
        x[:, 0], x[:, 5] = first, 0
        return x

    def lengths(split, x):
        return [5] * len(x)

    change = dict(audio=frames, vision=frames, audio_lengths=lengths, vision_lengths=lengths)
    if first:
        with pytest.raises(SystemExit, match='is for sources with one frame per word'):
            words_run(tmp_path, **change)
        return
    words_run(tmp_path, **change)
    assert 'the first frame of a clip is zero and stands before' in capsys.readouterr().out
    run, feed = evaluation.load_run_and_feed(str(tmp_path / 'run'), data_dir=str(tmp_path / 'data'))
    assert {w for clip in feed.words['test'] for w in clip} == {-1, 1, 2, 3, 4}
    # a user's clip that lacks its last frame does not show where its first word is
    own = Clips(run.facts, [dict(id='own', text='the film was good', audio=np.ones((4, 5), 'f4'),
                                 vision=np.ones((4, 3), 'f4'))])
    assert run.feed(own, run.knobs).first_word == 1


def test_words_may_have_frames_of_one_stream_alone(tmp_path):
    def absent(split, x):
        return None

    words_run(tmp_path, audio_lengths=lambda s, x: [4] * len(x), vision=absent, vision_lengths=absent)


def test_text_alone_reads_no_frames():
    k = CROSS_KNOBS | dict(gmra_concat='features', resample='none')
    assert 'take another resample' in CrossSent.check(k)[0]
    assert CrossSent.check(k | dict(modalities=['audio'])) == []   # nothing is joined
    alone = k | dict(gmra_layer=0)
    assert CrossSent.check(alone) == []
    assert CrossSent.streams(alone) == () and CrossSent.modalities_read(alone) == ['text']


def test_raw_frames_of_a_standardised_corpus_are_refused_before_training(tmp_path, monkeypatch):
    save_tiny_bert(tmp_path)
    make_corpus(tmp_path, 'half')
    with monkeypatch.context() as m:
        m.chdir(tmp_path)
        command('data.py', 'half.pkl', '--name=half', '--dtype=float16')
    flags = ['config/crosssent_mosi.py', f'--corpus={tmp_path}/data/half', f'--lm={tmp_path}/bert',
             '--device=cpu', '--max_steps=1', '--max_text_len=30', '--resample=linear',
             '--standardise=False']
    with pytest.raises(SystemExit, match='holds audio only standardised, and standardise is False'):
        train(*flags, f'--out_dir={tmp_path}/run')
    train(*flags, f'--out_dir={tmp_path}/text', '--gmra_layer=0')   # reads no frames


def test_frames_without_words_are_reported(tmp_path, capsys):
    words_run(tmp_path, raw_text=lambda s, x: [''] * len(x))
    output = capsys.readouterr().out
    assert 'no clip has both words and audio frames, so no token gets audio' in output
    run = evaluation.load(str(tmp_path / 'run'), data_dir=str(tmp_path / 'data'))
    assert np.isfinite(run.predict(text='the film was good')['score'])   # a clip without frames


# -------------------------------------------------------------------------------------------------
# Ordinal losses


def test_mpr_equals_a_loop_over_all_pairs():
    torch.manual_seed(0)
    y, p = torch.tensor([-1.0, 0.4, 0.4, 2.0, 2.6]), torch.randn(5, requires_grad=True)
    terms = []
    for i in range(5):
        for j in range(5):
            if abs(y[i] - y[j]) > 0.7:
                dy, dp = y[i] - y[j], p[i] - p[j]
                terms.append((0.1 + 0.5 * abs(dy) - torch.sign(dy) * dp).clamp(min=0))
    torch.testing.assert_close(mpr_loss(p, y, 0.7, 0.1, 0.5), torch.stack(terms).mean())
    for label in (y[:1], torch.full((5,), 0.3)):  # one clip, and equal labels: no pair, but a graph
        loss = mpr_loss(p[: len(label)], label, 0.7, 0.1, 0.5)
        loss.backward()
        assert loss.item() == 0


@pytest.mark.parametrize(
    'gap, margin, slope, punished',
    [(0.5, 0.1, 0.5, False), (0.5, 0.25, 0.5, False), (0.5, 0.5, 0.5, True), (0.5, 0.1, 1.0, True)],
)
def test_train_warns_exactly_where_mpr_punishes_perfect_predictions(
    gap, margin, slope, punished, capsys, corpora, tmp_path
):
    """ This is where alpha > (1 - beta) delta. """
    y = torch.linspace(-3, 3, 61)
    assert (float(mpr_loss(y, y, gap, margin, slope)) > 1e-6) == punished
    assert punished == (margin > (1 - slope) * gap)
    train(
        'config/crosssent_toy.py',
        f'--data_dir={corpora}',
        f'--out_dir={tmp_path}/run',
        '--max_steps=1',
        '--device=cpu',
        f'--mpr_gap={gap}',
        f'--mpr_margin={margin}',
        f'--mpr_slope={slope}',
    )
    assert ('MPR will punish even perfect predictions' in capsys.readouterr().out) == punished


# in the middle of the ramp-up, where the regularisers have half their weight
HALF_WAY = dict(epoch=torch.tensor(CROSS_KNOBS['ramp_epochs'] / 2))


def test_eioi_and_the_sum_of_both_regularisers_by_hand():
    """
    y = (0, 1, -2), p = (.1, 2, -3.25), band .25: the distances to the band are 0, .75 and 1, their
    mean is .5833 and the mean of their squares .5208.
    """
    y, p = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.1, 2.0, -3.25])
    assert float(eioi_loss(p, y, 0.25)) == pytest.approx(1.75 / 3)
    assert float(eioi_loss(p, y, 0.25, 2.0)) == pytest.approx((0.75**2 + 1) / 3)
    terms, total = ordinal_loss(
        p, y, CROSS_KNOBS | dict(eioi_band=0.25, weight_mpr=0.2, weight_eioi=0.4), HALF_WAY
    )
    assert float(total) == pytest.approx(0.5 * (0.2 * float(terms['mpr']) + 0.4 * 1.75 / 3))
    off = CROSS_KNOBS | dict(weight_mpr=0.0, weight_eioi=0.0)
    assert ordinal_loss(p, y, off, HALF_WAY) == ({}, 0.0)


# -------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope='session')
def toy_run(corpora, tmp_path_factory):
    out = tmp_path_factory.mktemp('crosssent')
    train(
        'config/crosssent_toy.py',
        f'--data_dir={corpora}',
        f'--out_dir={out}/run',
        *TINY,
        '--lm_vocab=60',
    )
    return out / 'run'


def test_a_run_trains_and_evaluates_again_from_its_files(toy_run, corpora):
    before = json.load(open(toy_run / 'result.json'))
    assert 'best possible' in evaluation.evaluate_again(str(toy_run))
    assert json.load(open(toy_run / 'result.json'))['test'] == before['test']
    log = [json.loads(line) for line in open(toy_run / 'log.jsonl')]
    assert {'task', 'mpr', 'eioi', 'loss'} <= set(log[0]['train'])


def test_zero_shot_on_another_corpus(toy_run, corpora, tmp_path):
    """
    The same corpus under another path gives the same numbers. Other widths are refused with a
    sentence; without audio and video such a corpus can be evaluated.
    """
    table = evaluation.evaluate_on(str(toy_run), str(corpora / 'toy'))

    def same(table):
        return len({tuple(line.split('|')[2:]) for line in table.splitlines()[2:]}) == 1

    text_alone = evaluation.evaluate_on(str(toy_run), str(corpora / 'toy'), [])
    assert same(table) and text_alone == evaluation.evaluate_without(str(toy_run), [])
    # the run's own mean is used to standardise, so another mean in the corpus changes nothing
    shutil.copytree(corpora / 'toy', tmp_path / 'shifted')
    without_checksums(tmp_path / 'shifted')
    meta = json.load(open(tmp_path / 'shifted' / 'meta.json'))
    for m in ('audio', 'vision'):
        meta['streams'][m]['mean'] = [v + 5 for v in meta['streams'][m]['mean']]
    json.dump(meta, open(tmp_path / 'shifted' / 'meta.json', 'w'))
    assert same(evaluation.evaluate_on(str(toy_run), str(tmp_path / 'shifted')))
    change = dict(audio=of_width(5), vision=of_width(9), vision_lengths=lambda s, x: [6] * len(x))
    other = make_corpus(tmp_path, 'other', **change).removeprefix('--corpus=')
    sentence = 'audio is 12 wide in toy and 5 in other.*leave it out'
    with pytest.raises(evaluation.EvalError, match=sentence):
        evaluation.evaluate_on(str(toy_run), other)
    assert not same(evaluation.evaluate_on(str(toy_run), other, []))


def save_tiny_bert(tmp_path):
    """ A tiny BERT with a WordPiece vocabulary, in the folder tmp_path / 'bert'. """
    from transformers import BertTokenizerFast

    words = '[PAD] [UNK] [CLS] [SEP] [MASK] the film was go ##od'.split()
    words += [f'w{i}' for i in range(50)]
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    tiny_bert().save_pretrained(tmp_path / 'bert')
    BertTokenizerFast(str(tmp_path / 'vocab.txt')).save_pretrained(tmp_path / 'bert')


def codes(n, words=True):
    """ For make_corpus: one column of n codes, a frame for each of the four words of a text. """
    def of_split(split, x):
        return np.random.default_rng(3).integers(0, n, (len(x), 4 if words else 6, 1)).astype('f4')
    return of_split


CODE_FLAGS = [
    *('--gmra_codes=5', '--standardise=False', '--resample=words'),
    *('--max_text_len=30', '--max_steps=2', '--device=cpu'),
]


@pytest.mark.parametrize('config', ['crosssent_mosi', 'baseline_coral'])
def test_codes_of_words_are_read_as_embeddings(config, tmp_path):
    """The paper's "discrete tags", which are expanded to the sub-words of a word."""
    save_tiny_bert(tmp_path)
    lengths = dict(audio_lengths=lambda s, x: [4] * len(x), vision_lengths=lambda s, x: [4] * len(x))
    corpus = make_corpus(tmp_path, 'tagged', audio=codes(5), vision=codes(5), **lengths)
    flags = [corpus, f'--lm={tmp_path}/bert', f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}/data']
    train(f'config/{config}.py', *flags, *CODE_FLAGS, *(['--dataset=mosi'] if 'coral' in config else []))
    assert np.isfinite(json.load(open(tmp_path / 'run' / 'result.json'))['test']['mae'])
    tensors = load_file(tmp_path / 'run' / 'best.safetensors')
    assert tensors['gmra.proj.audio.weight'].shape[1] == 5
    evaluation.main([str(tmp_path / 'run')])


def test_one_hot_codes_behind_a_linear_map_are_an_embedding():
    names = torch.tensor([[[2.0], [0.0], [4.0], [0.0]]])  # [1,4,1]
    real = torch.tensor([[True, True, True, False]])  # [1,4]
    linear = nn.Linear(5, 8, bias=False)
    one_hot, mask = one_hot_codes(dict(audio=(names, real)), 5)['audio']
    assert mask is real
    want = F.embedding(names[..., 0].long(), linear.weight.T)  # [1,4,8]
    assert torch.equal(linear(one_hot)[:, :3], want[:, :3])
    assert not one_hot[:, 3].any()   # padding is not the code 0


@pytest.mark.parametrize(
    'audio, flags, sentence',
    [
        (codes(5), ['--standardise=True'], 'gmra_codes reads codes as they are stored'),
        (codes(5), ['--resample=linear'], 'gmra_codes are names, of which no mean exists'),
        (codes(9), [], r'whole numbers from 0 to 4, and audio of the clip .* has others'),
        (lambda s, x: codes(5)(s, x) + 0.5, [], 'whole numbers from 0 to 4'),
        (lambda s, x: np.where(codes(5)(s, x) == 2, np.nan, 1), [], 'were NaN or infinite'),
        (lambda s, x: x[:, :4], [], 'one column of codes, and audio has 5 columns'),
        (codes(5, words=False), [], "resample='words' is for sources with one frame per word"),
    ],
)
def test_wrong_codes_are_refused(audio, flags, sentence, tmp_path):
    save_tiny_bert(tmp_path)
    n = 6 if 'one frame per word' in sentence else 4
    lengths = dict(audio_lengths=lambda s, x: [n] * len(x), vision_lengths=lambda s, x: [4] * len(x))
    corpus = make_corpus(tmp_path, 'tagged', audio=audio, vision=codes(5), **lengths)
    with pytest.raises(SystemExit, match=sentence):
        train(
            'config/crosssent_mosi.py', corpus, f'--lm={tmp_path}/bert', f'--out_dir={tmp_path}/run',
            f'--data_dir={tmp_path}/data', *CODE_FLAGS, *flags,
        )


def test_other_systems_can_use_the_regularisers(corpora, tmp_path):
    """ MPR and EIOI on DeepMLF's prediction and in MSE-Adapter's head. """
    ordinal = {
        name: v
        for name, v in CROSS_KNOBS.items()
        if name.startswith(('weight_', 'mpr_', 'eioi_')) and name in KNOBS
    }
    assert ordinal['weight_mpr'] == ordinal['weight_eioi'] == 0.1
    out = tiny_deepmlf(**ordinal | dict(weight_lm=0.0))(tiny_batch() | HALF_WAY)
    terms = out['terms']
    others = sum(terms[k] for k in ('task', 'av', 'text', 'fusion'))
    torch.testing.assert_close(out['loss'], others + 0.5 * 0.1 * (terms['mpr'] + terms['eioi']))
    train(
        'config/mse_toy.py',
        f'--data_dir={corpora}',
        f'--out_dir={tmp_path}/run',
        '--max_steps=2',
        '--device=cpu',
        '--readout=head',
        '--weight_mpr=0.1',
        '--weight_eioi=0.1',
        '--ramp_epochs=0',
        '--log_interval=1',
    )
    log = json.loads(open(tmp_path / 'run' / 'log.jsonl').readline())['train']
    assert log['loss'] == pytest.approx(
        log['task'] + 0.1 * log['mpr'] + 0.1 * log['eioi'], rel=1e-4
    )


@pytest.mark.parametrize('config', ['crosssent_mosi', 'crosssent_mosei', 'crosssent_sims'])
@pytest.mark.parametrize('resample', ['linear', 'words'])
def test_real_configs_run_on_files_of_their_layout(config, resample, tmp_path):
    """
    Each config with the widths of its corpus, and a tiny BERT with a WordPiece vocabulary as
    encoder.
    """
    save_tiny_bert(tmp_path)
    layouts = dict(mosi=(5, 20, 3), mosei=(74, 35, 3), sims=(33, 709, 1))
    d_a, d_v, limit = layouts[config.split('_')[1]]
    n = 4 if resample == 'words' else 6  # words of THE FILM WAS GOOD
    change = dict(
        audio=of_width(d_a),
        vision=of_width(d_v),
        audio_lengths=lambda s, x: [n] * len(x),
        vision_lengths=lambda s, x: [n] * len(x),
        regression_labels=lambda s, y: y * limit / 3,
    )
    train(
        f'config/{config}.py',
        make_corpus(tmp_path, 'unaligned_50', **change),
        f'--lm={tmp_path}/bert',
        f'--resample={resample}',
        '--max_text_len=30',
        f'--out_dir={tmp_path}/run',
        f'--data_dir={tmp_path}/data',
        '--max_steps=2',
        '--device=cpu',
    )
    assert np.isfinite(json.load(open(tmp_path / 'run' / 'result.json'))['test']['mae'])


@pytest.mark.parametrize(
    'flags, sentence',
    [
        (['--gmra_layer=9'], 'from 1 to 3'),
        (['--gmra_heads=5'], 'does not divide gmra_width'),
        (['--lm=no/such'], 'is not in the local cache'),
        (['--label=emotion', '--select=wf1'], 'classes'),
        (['--resample=nearest'], 'is none of linear'),
        (['--mpr_gap=-1'], 'at least 0'),
        (['--eioi_power=0'], 'must be at least 1'),
        (['--batch_size=1'], 'needs pairs of clips'),
        (['--resample=words'], 'is for sources with one frame per word'),
    ],
)
def test_bad_knobs_are_refused_with_a_sentence(flags, sentence, corpora, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train(
            'config/crosssent_toy.py',
            f'--data_dir={corpora}',
            f'--out_dir={tmp_path}/run',
            *TINY,
            '--lm_vocab=60',
            *flags,
        )


def test_byte_level_tokens_get_the_number_of_their_word(corpora):
    """
    Tokens of RoBERTa and GPT-2 begin with the space before a word. The tokens are those of the
    plain text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        ['the film was good'] * 9,
        trainers.BpeTrainer(vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    entries = dict(streams=(), first_word=None, k=dict(max_text_len=50), corpus=None, notes=[])
    feed = type('F', (), entries)
    text = 'the  film was goods'
    words = Feed._words(feed, tokenizer, 'train', [text])[0]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer([text])['input_ids'][0])
    spelled = {}
    for w, piece in zip(words, pieces):
        spelled[w] = spelled.get(w, '') + piece.replace('\u0120', '')
    assert len(words) == len(pieces)
    assert [spelled[w] for w in range(4)] == ['the', 'film', 'was', 'goods']


def test_shuffle_streams_swaps_audio_and_video_between_clips(corpora):
    """
    Each clip keeps its label and gets the audio and the video of one other clip. Each seed is
    another permutation.
    """
    corpus, feeds = data.open_corpus(str(corpora / 'toy')), []
    for on, seed in ((False, 0), (True, 0), (True, 0), (True, 1)):
        k = knobs_of_system(AVModel, system='av', shuffle_streams=on, seed=seed)
        feeds.append(Feed(corpus, k, None, 'cpu', AVModel.build(k, corpus, folder='')[0]))
    own, other, same_seed, other_seed = (f('test', np.arange(32)) for f in feeds)
    assert torch.equal(own['label'], other['label'])
    assert torch.equal(other['audio'], same_seed['audio'])
    assert not torch.equal(other['audio'], other_seed['audio'])

    def frames(b, m, i):
        return b[m][i, : b[m + '_len'][i]]

    def same(m, i, j):
        a, b = frames(own, m, i), frames(other, m, j)
        return a.shape == b.shape and torch.equal(a, b)

    sources = [[i for i in range(32) if same('audio', i, j)] for j in range(32)]
    assert all(
        len(i) == 1 and i[0] != j and same('vision', i[0], j) for j, i in enumerate(sources)
    )
    assert len({i[0] for i in sources}) == 32


def test_a_resumed_run_equals_an_uninterrupted_one_and_eval_keeps_the_tokenizer(
    corpora, tmp_path
):
    flags = [f'--data_dir={corpora}', *TINY, '--lm_vocab=60', '--save_interval=2']
    train('config/crosssent_toy.py', *flags, f'--out_dir={tmp_path}/whole', '--fresh=True')
    before = (tmp_path / 'whole' / 'hf' / 'tokenizer.json').stat().st_mtime_ns
    evaluation.evaluate_again(str(tmp_path / 'whole'))
    assert (tmp_path / 'whole' / 'hf' / 'tokenizer.json').stat().st_mtime_ns == before

    with killed_in_batch(6):
        train('config/crosssent_toy.py', *flags, f'--out_dir={tmp_path}/killed')
    train('config/crosssent_toy.py', *flags, f'--out_dir={tmp_path}/killed', '--resume=True')
    same_run(tmp_path / 'whole', tmp_path / 'killed')


def test_lr_encoder_changes_only_the_encoder_and_the_ramp_starts_at_zero(corpora, tmp_path):
    """
    After one step, runs with lr_encoder=0 and 1 differ in the encoder's weights only. In epoch 0
    the regularisers have weight 0.
    """
    for share in (0.0, 1.0):
        train(
            'config/crosssent_toy.py',
            f'--data_dir={corpora}',
            f'--out_dir={tmp_path}/{share}',
            '--max_steps=1',
            '--device=cpu',
            f'--lr_encoder={share}',
            '--warmup_epochs=0',
            '--log_interval=1',
        )
    a, b = (load_file(tmp_path / str(share) / 'last.safetensors') for share in (0.0, 1.0))
    # the order of the weights changes the last bit of the norm in clipping; a step is 1e-3
    different = {k for k in a if k.startswith('model.') and (a[k] - b[k]).abs().max() > 1e-6}
    assert different and all(k.startswith('model.encoder.') for k in different)
    log = json.loads(open(tmp_path / '0.0' / 'log.jsonl').readline())['train']
    assert log['loss'] == log['task'] and log['mpr'] > 0


# -------------------------------------------------------------------------------------------------
# CORAL


def test_rank_levels_equal_corals_equations_by_hand():
    levels = RankLevels(-1, 1, 1.0)  # levels -1, 0, 1; thresholds -0.5, 0.5
    score, label = torch.tensor([0.2, -3.0]), torch.tensor([1.0, 0.4])
    logits = levels(score).detach()
    torch.testing.assert_close(logits, torch.tensor([[0.7, -0.3], [-2.5, -3.5]]))
    above = [[1, 1], [1, 0]]
    total = 0.0
    for i in range(2):
        for k in range(2):
            p = 1 / (1 + np.exp(-float(logits[i, k])))
            total -= np.log(p if above[i][k] else 1 - p)
    assert float(levels.loss(logits, label)) == pytest.approx(total / 4, abs=1e-6)
    assert levels.score(logits).tolist() == [0.0, -1.0]


def test_rank_levels_start_as_the_score_rounded_to_a_level():
    levels, score = RankLevels(-3, 3, 0.1), torch.linspace(-4, 4, 81)
    torch.testing.assert_close(
        levels.score(levels(score)), score.clamp(-3, 3), rtol=0, atol=0.0501
    )
    assert levels.score(levels(torch.tensor([torch.nan]))).isnan().all()


def test_biases_out_of_order_come_into_order():
    """Theorem 1: at the optimum the biases descend, so no answer contradicts another."""
    torch.manual_seed(0)
    levels, label = RankLevels(-1, 1, 0.5), torch.rand(200) * 2 - 1
    levels.biases.data = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    score = label + 0.3 * torch.randn(200)
    optimizer = torch.optim.Adam([levels.biases], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        levels.loss(levels(score), label).backward()
        optimizer.step()
    assert (levels.biases.diff() < 0).all()


@pytest.mark.parametrize(
    'flags, sentence',
    [
        (['--level_step=0.7'], 'level_step=0.7 does not divide the range of the labels, -3 to 3'),
        (['--weight_mpr=0.1'], r'level_step \(CORAL\) replaces the loss of the score, and weight_mpr'),
        (['--level_step=1e-300'], 'level_step=1e-300 must be 0, or at least 0.001'),
        (
            ['--label=emotion', '--select=wf1'],
            "system='crosssent' cannot learn them, because it predicts a score",
        ),
    ],
)
def test_coral_refuses_what_it_cannot_learn(flags, sentence, corpora, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train(
            'config/baseline_coral.py',
            f'--data_dir={corpora}',
            f'--out_dir={tmp_path}/run',
            *TINY,
            '--lm_vocab=60',
            *flags,
        )


@pytest.mark.parametrize('dataset', ['toy', 'mosi', 'mosei', 'sims', 'minilm'])
def test_coral_trains_with_the_settings_of_crosssent(dataset):
    """So that the two differ in the loss alone."""

    def knobs_of(config, *flags):
        argv = [str(HERE / 'config' / f'{config}.py'), *flags]
        return run_knobs(argv, *declared_knobs(HERE / 'train.py'), SYSTEMS)[1]

    names = dict(toy='toy', minilm='mosi_minilm')
    theirs = knobs_of(f'crosssent_{names.get(dataset, dataset)}')
    ours = knobs_of('baseline_coral', f'--dataset={dataset}')
    free = {'dataset', 'log_interval'} | set(vars(OrdinalKnobs))
    assert {k: (ours[k], v) for k, v in theirs.items() if k in ours and k not in free
            and ours[k] != v} == {}


SYSTEMS_WITH_A_SCORE = dict(
    av=['config/av_toy.py'],
    deepmlf=['config/deepmlf_toy.py', '--mm_layers=[2]', '--n_fusion=2'],
    mse=['config/mse_toy.py', '--readout=head'],
    cmpta=['config/cmpta_toy.py', '--readout=head'],
    lora_lm=['config/lora_mosi_gemma.py', '--corpus=toy', '--lm_depth=0'],
    selfmm=['config/baseline_selfmm.py', '--lm_vocab=60'],
    mag=['config/baseline_mag.py', '--lm_vocab=60'],
)


@pytest.mark.parametrize('flags', SYSTEMS_WITH_A_SCORE.values(), ids=SYSTEMS_WITH_A_SCORE)
def test_any_system_with_a_score_learns_corals_levels(
    flags, corpora, curriculum, rated_lm, tmp_path
):
    name = flags[0]
    if not name.startswith(('config/av', 'config/baseline')):
        flags = [*flags, f'--lm={rated_lm}/lm']
    if name == 'config/deepmlf_toy.py':
        flags = [*flags, f'--av_from={curriculum}/av_toy']
    train(*flags, '--needs=[]', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run', *TINY,
          '--max_steps=2', '--level_step=0.5')
    with open(tmp_path / 'run' / 'test.jsonl') as f:
        pred = np.array([json.loads(line)['pred'] for line in f])
    assert np.isin(pred, np.arange(-3, 3.1, 0.5)).all()
    tensors = load_file(tmp_path / 'run' / 'last.safetensors')
    assert not torch.equal(tensors['model.levels.biases'], -torch.arange(-2.75, 3, 0.5))
    evaluation.main([str(tmp_path / 'run')])


def test_a_run_is_compared_with_the_bound_of_what_it_reads():
    def bound(config, *flags):
        argv = [str(HERE / 'config' / config), *flags]
        k = run_knobs(argv, *declared_knobs(HERE / 'train.py'), SYSTEMS)[1]
        return SYSTEMS[k['system']].bound(k)

    assert bound('crosssent_toy.py') == bound('mse_toy.py') == 'full'
    assert bound('crosssent_toy.py', '--gmra_layer=0') == 'text'
    assert bound('mse_toy.py', '--clip_words=False') == 'av'
    assert bound('mse_toy.py', '--shuffle_streams=True') == 'text'
    assert bound('av_toy.py') == 'av' and bound('av_toy.py', '--shuffle_streams=True') == ''


def test_a_killed_run_of_coral_resumes_bitwise(corpora, tmp_path):
    flags = [f'--data_dir={corpora}', *TINY, '--max_steps=6', '--save_interval=2', '--lm_vocab=60']
    train('config/baseline_coral.py', *flags, f'--out_dir={tmp_path}/whole')
    with killed_in_batch(5):
        train('config/baseline_coral.py', *flags, f'--out_dir={tmp_path}/killed')
    train('config/baseline_coral.py', *flags, f'--out_dir={tmp_path}/killed', '--resume=True')
    same_run(tmp_path / 'whole', tmp_path / 'killed')
