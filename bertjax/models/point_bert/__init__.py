"""The parts of Point-BERT (Yu et al. 2022, arXiv:2111.14819)."""

from bertjax.models.point_bert.dgcnn import DGCNN as DGCNN
from bertjax.models.point_bert.folding import Folding as Folding
from bertjax.models.point_bert.patch_embedding import (
  MiniPointNet as MiniPointNet,
)
from bertjax.models.point_bert.tokenizer import PointTokenizer as PointTokenizer
from bertjax.models.point_bert.tokenizer import Reconstruction as Reconstruction
from bertjax.models.point_bert.tokenizer import (
  point_tokenizer as point_tokenizer,
)
from bertjax.models.point_bert.trunk import PointEncoder as PointEncoder
from bertjax.models.point_bert.trunk import point_bert as point_bert
