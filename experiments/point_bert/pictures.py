"""Pictures of clouds, of what codes decode to, and of features."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bertjax.config import settings
from bertjax.evals.linear_probe import FEATURES
from bertjax.experiment import build_data
from bertjax.loading import load_model
from bertjax.predict import PointTokens, tokenize_points
from experiments import arms

_SPLIT = "test"


def decoded(
  run: arms.Run, count: int
) -> list[tuple[str, np.ndarray, PointTokens]]:
  """Class, points and codes of the last clouds of the test split."""
  model = load_model(run.workdir)
  stage = settings(model.config)
  data = build_data(stage.data, seed=0, cache_dir=stage.cache_path)
  found = data.clouds(_SPLIT)
  chosen = [found[len(found) - 1 - i] for i in range(count)]
  clouds = [cloud.points[: data.reading.num_points] for cloud in chosen]
  tokens = tokenize_points(model, clouds)
  names = [found.classes[cloud.label] for cloud in chosen]
  return list(zip(names, clouds, tokens, strict=True))


def draw_clouds(figure: Figure, run: arms.Run, count: int) -> None:
  """Clouds beside what they decode to, coloured by the codes."""
  rows = decoded(run, count)
  axes = figure.subplots(1, 2 * count, subplot_kw={"projection": "3d"})
  for number, (name, cloud, tokens) in enumerate(rows):
    gap = ((cloud[:, None] - tokens.centres) ** 2).sum(-1)
    size = len(tokens.points) // len(tokens.codes)
    codes = tokens.codes[gap.argmin(1)], np.repeat(tokens.codes, size)
    pairs = zip((cloud, tokens.points), codes, (name, "decoded"), strict=True)
    for panel, (points, colours, title) in zip(axes[2 * number :], pairs):
      panel.scatter(*points.T, c=colours % 20, cmap="tab20", s=2)
      panel.set_title(title, fontsize=8)
      panel.set_box_aspect(np.ptp(cloud, axis=0) + 0.1, zoom=1.5)
      panel.set_axis_off()


def features(run: arms.Run) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
  """[CLS] and the largest of the patches, of the run's unseen clouds.

  Returns:
    Features [n, d], class of each cloud [n], and names of the classes.
  """
  model = load_model(run.workdir)
  stage = settings(model.config)
  data = build_data(stage.data, seed=0, cache_dir=stage.cache_path)
  dataset = data.dataset(_SPLIT)

  @jax.jit
  def read(variables: Mapping, points: jax.Array) -> jax.Array:
    hidden = model.objective.apply(
      variables, {"points": points}, method="encode"
    )
    return FEATURES["cls_max"].pool(hidden)

  found, labels = [], []
  for batch in dataset.evaluation_batches(data.batch_size):
    known = batch["labels"] >= 0
    x = np.asarray(read(model.variables, jnp.asarray(batch["points"])))
    found.append(x[known])
    labels.append(batch["labels"][known])
  return np.concatenate(found), np.concatenate(labels), dataset.clouds.classes


def draw_features(pca: Axes, tsne: Axes, run: arms.Run, title: str) -> None:
  """Features in two dimensions, by either method, coloured by class."""
  from sklearn import decomposition, manifold

  x, labels, names = features(run)
  x = (x - x.mean(0)) / (x.std(0) + 1e-6)
  perplexity = min(30.0, (len(x) - 1) / 3)
  methods = {
    "PCA": (pca, decomposition.PCA(2)),
    "t-SNE": (
      tsne,
      manifold.TSNE(2, perplexity=perplexity, random_state=0, init="pca"),
    ),
  }
  for name, (panel, method) in methods.items():
    places = method.fit_transform(x)
    for number, label in enumerate(names):
      mine = labels == number
      panel.scatter(
        *places[mine].T, s=4, color=f"C{number % 10}",
        marker="o" if number < 10 else "x", label=label,
      )  # fmt: skip
    panel.set_title(f"{name} of features, {title}", fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])
  tsne.legend(fontsize=5)
