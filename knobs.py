"""
What the knobs of a run may be: lists of choices, ranges, and knobs that contradict each other. train.py asks before it
reads anything; eval.py asks before it builds a model from the knobs that a folder carries.
"""
from baselines import BASELINES
from prompts import PROMPTS

CHOICES = dict(
    system=('lm', 'av', 'deepmlf', 'mse', 'cmpta', 'crosssent', *BASELINES),
    lowercase=('auto', 'never'),
    device=('auto', 'cpu', 'cuda', 'mps'),
    dtype=('auto', 'float32', 'bfloat16', 'float16'),
    lm_init=('pretrained', 'random'),
    av_init=('tune', 'frozen', 'random'),
    fusion_position=('after', 'fixed'),
    mm_query=('fusion', 'text+fusion', 'text'),
    mm_gate=('sigmoid', 'tanh', 'none'),
    mm_ffw=('full', 'lora', 'none'),
    mm_ffw_init=('lm', 'random'),
    text_reg=('seqaug', 'noise', 'dropout', 'none'),
    text_reg_draw=('fixed', 'beta', 'halfnormal'),
    lm_text=('plain', 'rated'),
    prompt=tuple(PROMPTS),
    label_words=('index', 'name'),
    readout=('score', 'generate', 'head'),
    score_estimate=('expected', 'mode', 'median'),
    pseudo_projection=('released', 'full'),
    tgm_pool=('real', 'padded'),
    cmpta_pool=('mean', 'last', 'learned'),
    cmpta_align=('bi', 'one-way', 'off'),
    gmra_concat=('sequence', 'features'),
    gmra_start=('identity', 'random'),
    resample=('linear', 'mean', 'words', 'none'),
    text_pool=('first', 'mean'),
    text_features=('tuned', 'frozen'),
    shard_lm=('off', 'node', 'all'))
AT_LEAST_1 = '''batch_size accumulate epochs patience log_interval max_text_len lm_vocab lm_width lm_layers lm_heads
    lm_positions av_width av_layers av_heads av_len n_fusion mm_heads lora_rank head_width n_pseudo mse_width lstm_audio
    lstm_vision cmpta_width cmpta_heads cmpta_layers text_out post_width lmf_rank fusion_width fusion_heads
    fusion_layers almt_tokens'''.split()
AT_LEAST_0 = '''seed save_interval lr lr_min lr_encoder lr_audio lr_vision lr_factors mag_beta misa_diff misa_sim
    misa_rebuild warmup_epochs weight_decay adam_eps clip text_reg_rate lora_alpha gmra_layer gmra_width gmra_heads
    weight_mpr weight_eioi mpr_gap mpr_margin mpr_slope eioi_band ramp_epochs weight_av weight_text weight_fusion
    weight_lm'''.split()
SHARES = '''dropout av_dropout lora_dropout av_seqaug beta_1 beta_2 attn_dropout attn_dropout_audio
    attn_dropout_vision res_dropout embed_dropout'''.split()
LIST_LENGTHS = dict(sub_widths=3, sub_dropouts=3, kernels=3, head_widths=4, head_dropouts=4)


def wrong_knobs(c, metrics):
    """ What is wrong with the knobs `c` (a dict), as a list of phrases; `metrics` are the names that `select` may take. """
    choices = CHOICES | dict(select=metrics)
    wrong = [f"{k}={c[k]!r} is none of {', '.join(v)}" for k, v in choices.items() if c[k] not in v]
    wrong += [f"{k}={c[k]} must be at least 1" for k in AT_LEAST_1 if c[k] < 1]
    wrong += [f"{k}={c[k]} must be at least 0" for k in AT_LEAST_0 if c[k] < 0]
    wrong += [f"{k}={c[k]} must be in [0, 1)" for k in SHARES if not 0 <= c[k] < 1]
    if not 0 <= c['text_reg_prob'] <= 1:
        wrong += [f"text_reg_prob={c['text_reg_prob']} must be in [0, 1]"]
    if c['text_reg'] != 'noise' and c['text_reg_rate'] > 1:
        wrong += [f"text_reg_rate={c['text_reg_rate']} must be in [0, 1]"]
    if not 0 < c['train_fraction'] <= 1:
        wrong += [f"train_fraction={c['train_fraction']} must be in (0, 1]"]
    if not c['msf_scales'] or min(c['msf_scales']) < 1:
        wrong += [f"msf_scales={c['msf_scales']} must be numbers of at least 1"]
    if c['seed'] >= 2 ** 63:
        wrong += [f"seed={c['seed']} must be below 2^63"]
    for k, n in LIST_LENGTHS.items():
        if len(c[k]) != n:
            wrong += [f"{k}={c[k]} must be {n} numbers"]
        if 'drop' in k and not all(0 <= v < 1 for v in c[k]):
            wrong += [f"{k}={c[k]} must be in [0, 1)"]
        if 'drop' not in k and min(c[k], default=1) < 1:
            wrong += [f"{k}={c[k]} must be at least 1"]
    if c['text_features'] == 'frozen' and (c['system'] not in BASELINES or c['lm'] == 'new'):
        wrong += ["text_features='frozen' is for the baselines, with an --lm= that exists"]
    if not c['late_streams'] or set(c['late_streams']) - {'text', 'audio', 'vision'}:
        wrong += [f"late_streams={c['late_streams']} may hold 'text', 'audio' and 'vision', at least one"]
    if set(c['modalities']) - {'audio', 'vision'}:
        wrong += [f"modalities={c['modalities']} may hold 'audio' and 'vision' only"]
    if (c['system'] == 'lm') != (c['select'] == 'loss'):
        wrong += ["select is 'loss' for system='lm', and a metric for the others"]
    if c['gmra_mult'] < 0.1:
        wrong += [f"gmra_mult={c['gmra_mult']} must be at least 0.1"]
    if c['eioi_power'] < 1:
        wrong += [f"eioi_power={c['eioi_power']} must be at least 1: below, the gradient at the band's edge is infinite"]
    if c['weight_mpr'] or c['weight_eioi']:
        if c['system'] == 'lm' or c['system'] in ('mse', 'cmpta') and c['readout'] != 'head':
            wrong += ["weight_mpr and weight_eioi are for systems that predict a score by a head: --readout=head for 'mse' "
                      "and 'cmpta'"]
    if c['weight_mpr'] and c['batch_size'] == 1:
        wrong += ["weight_mpr needs pairs of clips: a batch_size of at least 2"]
    return wrong
