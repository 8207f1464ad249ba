""" What more than one test file stands on. """
import pytest

import toy


@pytest.fixture(scope='session')
def corpora(tmp_path_factory):
    """ A data_dir with a small toy corpus in it: 120 / 32 / 32 clips, made as the real one is. """
    folder = tmp_path_factory.mktemp('data')
    toy.make_toy(str(folder / 'toy'), n_clips=(120, 32, 32))
    return folder
