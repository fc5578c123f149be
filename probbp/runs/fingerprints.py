"""What a run is, in a few hashes: so that a checkpoint is never continued as something else."""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from probbp.runs.devices import nested_constants

ORDER = "the order of sums in "
"""What may differ between two processes that run one program, but for rounding."""


def fingerprint(
    programs: dict[str, tuple[Callable, tuple]], values: Any, settings: dict[str, Any]
) -> dict[str, str]:
    """Describe a run.

    A program is what JAX makes of a function, and every array that it closes over, to the last
    bit. It is hashed twice: as a graph, and as a text, in which the order of sums shows. That order
    may differ between two processes for one model: NumPyro's `Trace_ELBO` adds its sites in the
    order of a Python set, which hangs on the variable PYTHONHASHSEED. What Python does outside of
    the program, in a callback for instance, is not seen.

    Args:
        programs: names to a function and its arguments, of which the shapes count.
        values: a pytree of arrays and keys, of which the values count.
        settings: names to what has a readable `repr`, arrays, and mappings and lists of these.

    Returns:
        Names to texts, for JSON.
    """
    prints = {}
    for name, (fun, args) in programs.items():
        closed = jax.make_jaxpr(fun)(*args)
        prints |= {name: _hash_graph(closed), ORDER + name: hash_program(closed)}
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(values):
        hash_array(sha, leaf)
    prints["key and start"] = sha.hexdigest()
    prints |= {name: _in_full(value) for name, value in settings.items()}
    prints["version of JAX"] = jax.__version__
    prints["platform"] = jax.default_backend()
    prints["double precision"] = repr(jax.config.read("jax_enable_x64"))
    return prints


def hash_program(closed: jex.ClosedJaxpr) -> str:
    """Hash a program as a text, and every array that it closes over."""
    sha = hashlib.sha256(program_text(closed).encode())
    for const in constants(closed):
        hash_array(sha, const)
    return sha.hexdigest()


def program_text(closed: jex.ClosedJaxpr) -> str:
    """Return a program as a text that is the same in each process, but for what it closes over."""
    return _text(closed.jaxpr)


def constants(closed: jex.ClosedJaxpr) -> list[Any]:
    """Return all arrays that a program closes over."""
    return [*closed.consts, *nested_constants(closed.jaxpr)]


def same_bits(one: Any, other: Any) -> bool:
    """Return whether two constants of programs are equal to the last bit.

    One array of JAX is equal to itself, since none can be written to: its bits are not read. What
    JAX makes of an array of NumPy is another constant in each program.
    """
    if one is other:
        return True
    if jnp.result_type(one) != jnp.result_type(other) or np.shape(one) != np.shape(other):
        return False
    if jnp.issubdtype(jnp.result_type(one), jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    one, other = (np.ascontiguousarray(value).reshape(-1).view(np.uint8) for value in (one, other))
    return np.array_equal(one, other)


def hash_array(sha: Any, value: Any) -> None:
    """Feed an array to a hash: its type, its shape, its bits."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        sha.update(str(jax.random.key_impl(value)).encode())
        value = jax.random.key_data(value)
    sha.update(f"{jnp.result_type(value)}{np.shape(value)}".encode())
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = _checksum(value)
    sha.update(np.ascontiguousarray(value).tobytes())


def same_run(theirs: dict[str, str], ours: dict[str, str]) -> bool:
    """Return whether two fingerprints are those of one run, in whatever order it adds."""
    return hash_run(theirs) == hash_run(ours)


def hash_run(prints: dict[str, str]) -> str:
    """Hash a fingerprint, so that those of one run, in whatever order it adds, have one hash."""
    same = [f"{name}: {text}" for name, text in prints.items() if not name.startswith(ORDER)]
    return _hash(sorted(same))


def _in_full(value):
    """Write a setting as a text. The `repr` of a long array leaves out its middle."""
    text = _listed(value)
    return text if len(text) < 1000 else f"sha256 {_hash([text])}"


def _listed(value):
    if isinstance(value, Mapping):
        items = [f"{name!r}: {_listed(entry)}" for name, entry in value.items()]
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_listed, value))})"
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape} {array.tolist()!r}"
    return repr(value)


def _text(value):
    text = re.sub(r"0x[0-9a-f]+", "", str(value))
    # Sets are printed in the order of Python's hashes, which differ from process to process.
    return re.sub(r"frozenset\(\{(.*?)\}\)", lambda match: str(sorted(match[1].split(", "))), text)


def _hash_graph(closed):
    """Hash what a program computes, whatever the order of its lines and of its sums."""
    return _hash(_outputs(closed, [f"argument {i}" for i in range(len(closed.in_avals))]))


def _outputs(closed, inputs):
    """Hash each output: an operation by its name, its parameters, and its operands' hashes.

    A sum is hashed by its terms, sorted.
    """
    jaxpr, consts = (
        (closed.jaxpr, closed.consts) if isinstance(closed, jex.ClosedJaxpr) else (closed, ())
    )
    known, terms = {}, {}
    for var, value in zip(jaxpr.constvars, consts, strict=True):
        known[var] = _hash_value(value)
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(var):
        return _hash_value(var.val) if isinstance(var, jex.Literal) else known[var]

    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        name = eqn.primitive.name
        if name in ("add", "add_any"):
            parts = [
                terms.get(var, [operand]) if not isinstance(var, jex.Literal) else [operand]
                for var, operand in zip(eqn.invars, operands, strict=True)
            ]
            (out,) = eqn.outvars
            terms[out] = sorted(sum(parts, []))
            known[out] = _hash(["add", str(out.aval), *terms[out]])
            continue
        words, inner = [], []
        for key, value in sorted(eqn.params.items()):
            branches = value if isinstance(value, tuple | list) else (value,)
            if any(isinstance(v, jex.Jaxpr | jex.ClosedJaxpr) for v in branches):
                inner += [h for v in branches for h in _outputs(v, _inputs(eqn, key, v, operands))]
            else:
                words.append(f"{key}={_text(value)}")
        # Where there is a program inside, the operands stand in its own hashes.
        operands = [*sorted(operands), *inner] if inner else operands
        whole = _hash([name, *words, *operands])
        for i, out in enumerate(eqn.outvars):
            known[out] = _hash([whole, str(i), str(out.aval)])
    return [read(var) for var in jaxpr.outvars]


def _inputs(eqn, key, inner, operands):
    """The operands that an operation hands to a program inside of it, or their places."""
    num = len(inner.in_avals if isinstance(inner, jex.ClosedJaxpr) else inner.invars)
    if eqn.primitive.name == "while":
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts = operands[:first] if key == "cond_jaxpr" else operands[first : first + second]
        operands = [*consts, *operands[first + second :]]
    elif eqn.primitive.name == "cond":
        operands = operands[1:]
    places = [f"place {i}" for i in range(num)]
    return operands if len(operands) == num else places


def _hash(words):
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _hash_value(value):
    sha = hashlib.sha256()
    hash_array(sha, value)
    return sha.hexdigest()


@jax.jit
def _checksum(value):
    """A sum over the bits of an array of which each process holds a part only."""
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        value = jnp.stack([value.real, value.imag])
    if value.dtype == bool:
        value = value.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(value, unsigned).ravel()
    odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
    low = bits.astype(jnp.uint32)
    high = (bits >> (unsigned.itemsize * 4)).astype(jnp.uint32)
    return jnp.stack([jnp.sum(low * odd), jnp.sum(high * odd)])
