"""
LMs, encoders and tokenizers made from nothing, and the text encoder that the knobs describe.
"""
import io
import os

from lm import TextEncoder
from run.errors import ModelError
from run.folder import make_plain_folder
from run.load_lm import load_encoder, load_tokenizer, silence_transformers


def new_tokenizer(texts, k, folder, ends=False):
    """
    A sentencepiece tokenizer trained on `texts`, saved in `folder` (tokenizer.json for
    AutoTokenizer, tokenizer.model beside it). ends: it puts <s> before each text and </s> behind.
    Raises ModelError.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    if k['lm_positions'] < k['max_text_len']:
        raise ModelError(f"lm_positions={k['lm_positions']} is less than "
                         f"max_text_len={k['max_text_len']}: raise it.")
    if k['lm_width'] % k['lm_heads']:
        raise ModelError(f"lm_heads={k['lm_heads']} does not divide lm_width={k['lm_width']}: take "
                         "a divisor of it.")

    proto = io.BytesIO()
    # required, rare as they may be: labels are written in them
    numbers = ''.join(sorted(set('0123456789.+-') & set(''.join(texts))))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=proto,
            vocab_size=k['lm_vocab'],
            model_type='unigram',
            num_threads=1,
            hard_vocab_limit=False,
            split_digits=True,
            normalization_rule_name='identity',
            required_chars=numbers,
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
        )
    except RuntimeError as e:
        raise ModelError(f"no sentencepiece tokenizer of lm_vocab={k['lm_vocab']} can be trained "
                         f"on this text ({str(e).splitlines()[-1][-120:]}): change "
                         "lm_vocab.") from None

    sp = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.vocab_size())]
    fast = Tokenizer(models.Unigram(pieces, unk_id=0))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.add_special_tokens([AddedToken(t, special=True) for t in ('<unk>', '<s>', '</s>')])
    if ends:
        special = [('<s>', 1), ('</s>', 2)]
        fast.post_processor = processors.TemplateProcessing('<s> $A </s>', special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token='<unk>', bos_token='<s>', eos_token='</s>')
    make_plain_folder(folder)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as e:   # tokenizers raises no other class for a full disk
        raise OSError(str(e)) from None
    with open(os.path.join(folder, 'tokenizer.model'), 'wb') as f:
        f.write(proto.getvalue())
    return tokenizer


def new_lm(texts, k, folder, again=False, as_data=False):
    """
    A GPT-2 of lm_layers x lm_width from nothing, and a tokenizer trained on `texts` (again: the one
    in `folder`, which as_data reads as data alone). `folder` becomes an ordinary Hugging Face
    folder when the trained weights are saved there.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    silence_transformers()  # train.py saves it
    if again:
        tokenizer = load_tokenizer(folder, as_data=as_data)
    else:
        tokenizer = new_tokenizer(texts, k, folder)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=k['lm_positions'],
        n_embd=k['lm_width'],
        n_layer=k['lm_layers'],
        n_head=k['lm_heads'],
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=k['dropout'],
        embd_pdrop=k['dropout'],
        attn_pdrop=k['dropout'],
    )
    if not again:
        config.save_pretrained(folder)   # a resumed run reads it to load the tokenizer
    return GPT2LMHeadModel(config), tokenizer


def new_encoder(texts, k, folder, again=False, as_data=False):
    """
    A BERT of lm_layers x lm_width from nothing, and a tokenizer trained on `texts` (again: the one
    in `folder`, which as_data reads as data alone).
    """
    from transformers import BertConfig, BertModel
    if again:
        tokenizer = load_tokenizer(folder, as_data=as_data)
    else:
        tokenizer = new_tokenizer(texts, k, folder, ends=True)
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=k['lm_positions'],
        hidden_size=k['lm_width'],
        num_hidden_layers=k['lm_layers'],
        num_attention_heads=k['lm_heads'],
        intermediate_size=4 * k['lm_width'],
        hidden_dropout_prob=k['dropout'],
        attention_probs_dropout_prob=k['dropout'],
    )
    if not again:  # a finished run is read: nothing is written into it
        config.save_pretrained(folder)
    return TextEncoder(BertModel(config)), tokenizer


def load_text_encoder(k, texts, folder, trained=False, as_data=False):
    """
    The TextEncoder of the knobs k and its tokenizer: pretrained, or (k['lm'] == 'new') made from
    nothing with a tokenizer trained on `texts`, in folder/hf; trained=True takes the tokenizer that
    is there. Raises ModelError.
    """
    if k['lm'] == 'new':
        return new_encoder(texts, k, os.path.join(folder, 'hf'), again=trained, as_data=as_data)
    return load_encoder(k['lm'], k['trust_remote_code'], as_data)
