"""
The keys of a source: the names that it may give to each field, and notes on which keys were read
under another name, were not read, or got a default.
"""
import math
import re

from corpora.lazy import Lazy, LazyArray, Unread
from corpora.limits import text_bytes
from corpora.unpickle import CorpusError

SPLITS = ('train', 'valid', 'test')
STREAMS = ('audio', 'vision')
N_NAMED = 5  # the most clips that meta.json lists as examples of a problem


def _name_table(**fields):
    """ {known name: field}, from the known names of each field, separated by spaces. """
    return {name: field for field, names in fields.items() for name in names.split()}


def stream_names():
    """ The known names of the streams and of their lengths, for _name_table. """
    names = dict(
        audio='audio audios acoustic acoustics covarep speech voice '
              'audio_features audio_feature audio_feat acoustic_features',
        vision='vision video videos visual visuals facet facet_4_1 facet_4_2 openface openface_2 '
               'openface_2_0 vision_features video_features visual_features vision_feature '
               'video_feature visual_feature vision_feat video_feat visual_feat')
    lengths = {}
    for m in names:
        ends = ('lengths', 'length', 'lens', 'len')
        lengths[m + '_lengths'] = ' '.join(f'{n}_{end}' for n in names[m].split() for end in ends)
    return names | lengths


def label_names():
    """ The known names of the scores. CH-SIMS has a score of the clip and one of each modality. """
    names = ('regression_labels', 'regression_label', 'labels', 'label', 'sentiment', 'sentiments',
             'scores', 'score')
    ends = ('', '_T', '_A', '_V')
    return {'label' + end: ' '.join(n + end.lower() for n in names) for end in ends}


TEXT_NAMES = ('raw_text raw_texts rawtext text_raw text texts transcript transcripts transcription '
              'utterance utterances sentence sentences')
OTHER_NAMES = dict(
    id='id ids clip_id clip_ids segment_id utterance_id',
    speaker='speaker speakers speaker_id',
    dialogue='dialogue dialogues dialogue_id dialog dialog_id conversation conversation_id',
)
MSENA_FIELDS = _name_table(text=TEXT_NAMES, **stream_names(), **label_names(), **OTHER_NAMES)
# in a list of clips, a clip is a dict, and its entry 'features' is another dict
CLIP_FIELDS = _name_table(emotion='label labels emotion emotions', **OTHER_NAMES)
FEATURE_FIELDS = _name_table(text=TEXT_NAMES, **stream_names())
SPLIT_FIELDS = _name_table(
    train='train training', valid='valid validation val dev', test='test testing')
# the names of fields in a layout, where they differ from ours
MSENA_OWN = {'text': 'raw_text', 'label': 'regression_labels', 'label_T': 'regression_labels_T',
             'label_A': 'regression_labels_A', 'label_V': 'regression_labels_V'}
LISTS_OWN = {'emotion': 'label', 'vision': 'video', 'audio_lengths': 'audio_len',
             'vision_lengths': 'video_len'}
# arrays with one entry per token: BERT's ids, mask and types [N,3,L], or text features [N,L,d]
TEXT_MASKS = ('text_bert', 'bert', 'bert_tokens')
TEXT_FEATURES = ('text', 'text_features', 'text_feature', 'text_feat', 'glove', 'language')


def key_name(key):
    """ A key as in the name tables: lower case, with _ between its runs of letters and digits. """
    key = key.decode('latin1') if type(key) is bytes else str(key)
    return re.sub('[^a-z0-9]+', '_', key.lower()).strip('_')


def printed(key):
    """ A key as it is printed: ASCII, on one line, and at most 60 characters. """
    key = key.decode('latin1') if type(key) is bytes else str(key)
    return ascii(key)[1:-1][:60]


def valid_unicode(name):
    """ The name of a file, with bytes that are no UTF-8 as escapes. """
    return name.encode('utf-8', 'backslashreplace').decode()


def video_of(clip):
    """ The video in an id such as VIDEO$_$CLIP (MOSI) or VIDEO[CLIP] (MOSEI); None without one. """
    found = re.fullmatch(r'(.+?)(?:\$_\$.*|\[\d+\])', clip, re.DOTALL)
    return found and found[1]


def _holds_text(value):
    """ True for text, and for a list or array whose first entry is text. """
    if type(value) is LazyArray:
        if value.dtype != object:
            return value.dtype.kind in 'US'
        value = value.payload
    if type(value) in (list, tuple):
        value = next((v for v in value if v is not None), None)
    return isinstance(value, (str, bytes, bytearray, Lazy))


def find_fields(holder, table, own, where):
    """
    {field: key} for the keys of the dict `holder` that name a field in `table`. Keys with the value
    None are ignored. The key of a text must hold text, and the key of a stream, of lengths or of
    scores must not: 'text' may be BERT features, and 'video' may be a path. own {field: name} has
    the layout's names where they differ from the field's. If two keys fit a field of OTHER_NAMES,
    such as the id, the layout's own name is taken. Raises CorpusError if two keys fit otherwise.
    """
    named = {}
    for key, value in holder.items():
        field = table.get(key_name(key))
        if field and value is not None:
            named.setdefault(field, []).append(key)
    found = {}
    for field, keys in named.items():
        fits = keys
        if field == 'text':
            fits = [k for k in keys if _holds_text(holder[k])]
        elif field.startswith((*STREAMS, 'label')):
            fits = [k for k in keys if not _holds_text(holder[k])]
        if len(fits) > 1 and field in OTHER_NAMES:  # such as 'id' and 'clip_id'
            fits = [k for k in fits if printed(k) == own.get(field, field)] or fits
        if len(fits) > 1:
            one, two = map(printed, fits[:2])
            raise CorpusError(f"The keys '{one}' and '{two}' {where} both name the {field}; remove "
                              "one of them from the source.")
        if not fits:  # keep the layout's own key, so that a later error can name it
            fits = [k for k in keys if k == own.get(field, field)]
        if fits:
            found[field] = fits[0]
    return found


class Summary:
    """
    Notes of a conversion for meta.json. encoding: the codec that the user gave, or None. table: the
    columns that the user gave, {flag of corpora/tables.py: column}. label_column: the column of
    scores that have several for each clip, or None. most_text: the bytes that all texts may have.
    padding: the side that the user gave, or None.

    renamed {key: field}: the keys that were read under another name.
    unread {key: dict(shape, count)}: the keys that were not read.
    defaults {field: dict(count, first)}: how many missing values got a default, and in which clips.
    text {problem: count}: the texts that were repaired or look wrong.
    notes: sentences on anything else.
    files: the paths of further files that were read, whose content belongs to the source.
    """

    def __init__(self, encoding=None, table=None, label_column=None, most_text=math.inf,
                 padding=None):
        self.encoding = encoding
        self.table = table or {}
        self.label_column = label_column
        self.most_text = most_text
        self.padding = padding
        self.notes = []
        self.files = []
        self.renamed = {}
        self.unread = {}
        self.defaults = {}
        self.text = {}

    def spend_text(self, values, where):
        """
        Raises CorpusError if the texts and ids that were read, with these, are far longer than the
        source, because many clips share one text. values: as they are in the source.
        """
        self.most_text -= sum(map(text_bytes, values))
        if self.most_text < 0:
            raise CorpusError(f"{where} and the texts before it are far longer than the source, so "
                              "many clips share one long text; give each clip its own text.")

    def note_fields(self, holder, found, own):
        """ Notes the keys of `holder` that were read under another name, and those not read. """
        for field, key in found.items():
            if printed(key) != own.get(field, field):
                self.renamed[printed(key)] = field
        for key, value in holder.items():
            if value is None or key in found.values():
                continue
            entry = self.unread.setdefault(printed(key), dict(shape=_shape(value), count=0))
            if type(value) is Unread:
                entry['type'] = value.name
            entry['count'] += 1

    def note_default(self, field, split, i, name=None):
        """ Notes that clip i of a split got a default for a field. name: the clip's id. """
        entry = self.defaults.setdefault(field, dict(count=0, first=[]))
        entry['count'] += 1
        if len(entry['first']) < N_NAMED:
            entry['first'].append(name or f'entry {i} of {split}')

    def count_text(self, problem):
        """ Counts a text with a problem, a key of meta.json's entry `text`. """
        self.text[problem] = self.text.get(problem, 0) + 1


def _shape(value):
    """ The shape of an array, [number of entries] of a list, None for anything else. """
    if type(value) is LazyArray:
        return list(value.shape)
    return [len(value)] if type(value) in (list, tuple) else None
