"""MGN: multiple granularity network (Wang et al., ACM Multimedia 2018, arXiv 1804.01438)."""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.heads import Classifiers, Reduction, kaiming_init, near_one_init
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.resnet import ResNet, TrunkSpec, torchvision_name
from mros_jax.models.stripes import check_height, pool_stripes, stripe_edges
from mros_jax.models.trunks import find_resnet


class MGN(nn.Module):
    """A shared trunk, and branches with the rest of it each: one global, others with stripes.

    The trunk ends with layer3's first block. A branch's tail is the rest of layer3 and layer4, of
    its own; the global branch's layer4 has stride 2, the others' 1. Every branch is pooled over its
    whole map, and every other one over its stripes too (Figure 3 of the paper).

    Attributes:
        num_classes: identities of the training set, N.
        trunk: a ResNet in `mros_jax.models.trunks.TRUNKS`.
        stripes: stripes of each branch beside the global one.
        pooling: of whole maps and stripes, "max" (the paper's) or "mean".
        reduced: numbers that each pooled vector is reduced to, by a layer of its own.
        global_heads: the classifiers of whole maps see the vectors before ("z", as in the paper)
            or after reduction ("f"). Those of stripes always see f.
        head_bias: classifiers with a bias.
        dtype: compute dtype of trunk and tails; what follows, parameters and statistics are
            float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Outputs:
        embeddings: before and after reduction, of whole maps "z_global" and "f_global", one vector
            a branch, the global branch first; of stripes "z_partS" and "f_partS", S a number in
            `stripes`, top first.
        logits: "global" and "partS".
        maps: "t1", "t2", "shared", "t4_global" and "t4_partS".
        descriptor: all f, "f_global" first; 8 x 256 numbers by default.

    Example:
        >>> model = MGN(num_classes=751)
        >>> variables = model.init(key, images, train=False)
        >>> model.apply(variables, images, train=False).descriptor  # (B, 2048)
    """

    num_classes: int
    trunk: str = "resnet50"
    stripes: tuple[int, ...] = (2, 3)
    pooling: Literal["max", "mean"] = "max"
    reduced: int = 256
    global_heads: Literal["z", "f"] = "z"
    head_bias: bool = False
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        images: Shaped[np.ndarray | Array, "..."],
        *,
        train: bool = False,
        keys: Key[Array, "B"] | None = None,
    ) -> Outputs:
        """Compute all outputs; see `mros_jax.models.outputs.Network`.

        Raises:
            UserError: fields that make no network; images of another rank, channel number or type,
                or of a height that does not give equal stripes (names heights that do).
        """
        spec = find_resnet(self.trunk)
        check_images(images)
        self._check(spec, images.shape[1])
        names = spec.blocks()
        cut = names.index("layer3_0") + 1
        trunk = self._make_piece(spec, name="trunk", blocks=names[:cut])
        shared = trunk(jnp.asarray(images), train=train)
        maps = {"t1": shared["t1"], "t2": shared["t2"], "shared": shared["t3"]}

        whole: list[Array] = []
        pooled: dict[str, Array] = {}
        for branch, count in self._branches().items():
            tail = self._make_piece(
                spec,
                name=f"tail_{branch}",
                blocks=names[cut:],
                stem=False,
                last_stride=2 if branch == "global" else 1,
            )
            t4 = tail(shared["t3"], train=train)["t4"]
            maps[f"t4_{branch}"] = t4
            whole.append(pool_stripes(t4, 1, overlap=False, kind=self.pooling))
            if branch != "global":
                pooled[branch] = pool_stripes(t4, count, overlap=False, kind=self.pooling)
        pooled = {"global": jnp.concatenate(whole, axis=1), **pooled}  # (B, S, C) each

        embeddings: dict[str, Array] = {}
        logits: dict[str, Array] = {}
        for kind, z in pooled.items():
            f = Reduction(
                self.reduced,
                shared=False,
                kernel_init=kaiming_init,
                scale_init=near_one_init,
                bn_axis_name=self.bn_axis_name,
                dtype=jnp.promote_types(self.dtype, jnp.float32),
                name=f"reduction_{kind}",
            )(z, train=train)
            head = Classifiers(self.num_classes, self.head_bias, name=f"classifier_{kind}")
            logits[kind] = head(z if kind == "global" and self.global_heads == "z" else f)
            embeddings |= {f"z_{kind}": z, f"f_{kind}": f}
        # (B, S, F) -> (B, S * F) per kind
        reduced = [embeddings[f"f_{kind}"].reshape(images.shape[0], -1) for kind in pooled]
        return Outputs(jnp.concatenate(reduced, axis=-1), embeddings, logits, maps)

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """The whole image as each branch sees it, then the stripes of each branch."""
        branches = self._branches()
        whole = tuple(Part("global", self.reduced) for _ in branches)
        return whole + tuple(
            Part(branch, self.reduced, top, bottom)
            for branch, count in branches.items()
            if branch != "global"
            for top, bottom in stripe_edges(count, overlap=False)
        )

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """Trunk and tails start from ImageNet weights, all tails from the same."""
        if path[0] == "trunk" or path[0].startswith("tail_"):
            return torchvision_name(path[1:])
        return None

    def _branches(self) -> dict[str, int]:
        """The stripes of each branch by its name."""
        return {"global": 1, **{f"part{count}": count for count in self.stripes}}

    def _make_piece(self, spec: TrunkSpec, **fields: Any) -> ResNet:
        return spec.make(dtype=self.dtype, bn_axis_name=self.bn_axis_name, **fields)

    def _check(self, spec: TrunkSpec, height: int) -> None:
        if self.num_classes < 1 or self.reduced < 1:
            raise UserError(
                f"num_classes {self.num_classes} and reduced {self.reduced} must be 1 or more"
            )
        if self.global_heads not in ("z", "f"):
            raise UserError(f"global_heads is {self.global_heads!r}; it must be 'z' or 'f'")
        if len(set(self.stripes)) < len(self.stripes) or min(self.stripes, default=1) < 1:
            raise UserError(
                f"stripes are {self.stripes}; expected other numbers of 1 or more for each branch"
            )
        for count in self.stripes:
            check_height(height, spec.stride("t4"), count, f"part{count}")
