"""
BASELINES, the dict of all baselines by the name that the knob `system` has for them.
"""
from baselines.almt import ALMT
from baselines.mag import MAGBERT
from baselines.misa import MISA
from baselines.mmim import MMIM
from baselines.mult import MulT
from baselines.selfmm import TETFN, SelfMM
from baselines.vectors import LFDNN, LMF, TFN, Late

BASELINES = dict(late=Late, lfdnn=LFDNN, tfn=TFN, lmf=LMF, mag=MAGBERT,
                 mult=MulT, misa=MISA, selfmm=SelfMM, tetfn=TETFN, almt=ALMT,
                 mmim=MMIM)
