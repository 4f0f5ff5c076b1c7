"""`Cluster`: the machines that a plan is made for. They need not exist here; `Cluster.local()` describes this one.

Bandwidths are bytes per second in one direction, as one device sees them in a ring collective: what nccl-tests
calls bus bandwidth. A collective of `n` devices then takes `steps * latency_s + share * bytes / bandwidth`, with
`steps = n - 1` and `share = (n - 1) / n` for an all-gather or a reduce-scatter of `bytes` in total, twice that for
an all-reduce.

Presets give peaks and capacities from data sheets, dense, without structured sparsity, and links as measured by the
cited people, because a ring reaches some 80 % of NVLink's line rate. Each preset lists where its figures come from.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

from alpa_like.errors import ClusterError
from alpa_like.texts import counted

__all__ = ["CallTime", "Cluster", "Device", "Link", "Profile"]

_GIB = 2**30

# A dtype that a device does not list runs like the next one here, at that share of its rate; any other like float32.
# XLA computes in the wider type where the hardware lacks the narrow one. Half of float32's rate for float64 holds on
# CPUs and on the vector units of GPUs; TPUs emulate float64 and are slower than that.
_RUNS_LIKE = {
    "float64": ("float32", 0.5),
    "complex128": ("float64", 1.0),
    "float8_e4m3fn": ("bfloat16", 1.0),
    "float8_e5m2": ("float8_e4m3fn", 1.0),
    "uint8": ("int8", 1.0),
    "int4": ("int8", 1.0),
    "uint4": ("int8", 1.0),
}

# StableHLO's names of element types, so that an operator graph can ask with its own.
_MLIR_NAMES = {
    "f64": "float64",
    "f32": "float32",
    "tf32": "tensorfloat32",
    "bf16": "bfloat16",
    "f16": "float16",
    "f8E4M3FN": "float8_e4m3fn",
    "f8E5M2": "float8_e5m2",
    "i8": "int8",
    "ui8": "uint8",
    "i4": "int4",
    "ui4": "uint4",
    "complex<f32>": "complex64",
    "complex<f64>": "complex128",
}


def _check_positive(what: str, value: object, *, or_zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClusterError(f"{what} must be a number, found {value!r}")
    if not (0 < value < math.inf or (or_zero and value == 0)):
        bound = "of at least 0" if or_zero else "above 0"
        raise ClusterError(f"{what} must be a finite number {bound}, found {value!r}")


def _check_share(what: str, value: float, *, or_zero: bool = False) -> None:
    _check_positive(what, value, or_zero=or_zero)
    if value > 1:
        raise ClusterError(f"{what} is a share, at most 1, found {value}")


def _check_count(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ClusterError(f"{what} must be a whole number of at least 1, found {value!r}")


def _check_name(what: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ClusterError(f"{what} must be a text that is not empty, found {value!r}")


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator. `peak_flops` pairs dtype names with dense matmul FLOP/s and lists at least `float32`.

    `float32` is true float32 on GPUs; what JAX does there by default from Ampere on is `tensorfloat32`. On TPUs
    JAX's default float32 matmul is one bfloat16 pass, so both figures are the same. `flops_efficiency` is the share
    of the peak that large matmuls reach, `memory_efficiency` that of the bandwidth that large kernels reach.
    `exposed` says what share of the shorter of a kernel's arithmetic and its memory traffic the longer one does not
    hide: 0 is the roofline, 1 has them one after the other.
    """

    name: str
    peak_flops: tuple[tuple[str, float], ...]
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    flops_efficiency: float
    memory_efficiency: float = 1.0
    exposed: float = 0.0

    def __post_init__(self) -> None:
        _check_name("the device's name", self.name)
        where = f"device {self.name!r}: "
        dtypes = [dtype for dtype, _ in self.peak_flops]
        if "float32" not in dtypes or len(set(dtypes)) < len(dtypes):
            raise ClusterError(f"{where}peak_flops must list float32, and each dtype once, found {dtypes}")
        for dtype, flops in self.peak_flops:
            _check_positive(f"{where}peak_flops of {dtype}", flops)
        _check_count(f"{where}memory_bytes", self.memory_bytes)
        _check_positive(f"{where}memory_bandwidth_bytes_per_s", self.memory_bandwidth_bytes_per_s)
        _check_share(f"{where}flops_efficiency", self.flops_efficiency)
        _check_share(f"{where}memory_efficiency", self.memory_efficiency)
        _check_share(f"{where}exposed", self.exposed, or_zero=True)

    def flops_per_s(self, dtype: str) -> float:
        """Peak FLOP/s of dense matmuls in `dtype`, a NumPy or StableHLO name (`bfloat16`, `bf16`).

        A dtype that the device does not list runs like a wider one: float8 like bfloat16, 4-bit and unsigned integers
        like int8, float64 at half of float32, all others like float32. Multiply by `flops_efficiency` for what a large
        matmul reaches.
        """
        peaks = dict(self.peak_flops)
        name, share = _MLIR_NAMES.get(dtype, dtype), 1.0
        while name not in peaks:
            name, factor = _RUNS_LIKE.get(name, ("float32", 1.0))
            share *= factor
        return peaks[name] * share


@dataclass(frozen=True, slots=True)
class Link:
    """What one device of a group sees: bytes per second in one direction, and seconds per step of a ring or message."""

    bandwidth_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        _check_positive("a link's bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        _check_positive("a link's latency_s", self.latency_s, or_zero=True)


@dataclass(frozen=True, slots=True)
class CallTime:
    """A collective among `members` devices of a host takes `latency_s`, plus its buffer at `bytes_per_s`.

    The buffer is the one that `cost.ring_bytes` takes. All groups of the host communicate at once. `queued_s` is the
    latency of one of many that the devices run in a row, as they gather parameters; None: it is the same.
    """

    kind: str
    members: int
    latency_s: float
    bytes_per_s: float
    queued_s: float | None = None

    def __post_init__(self) -> None:
        where = f"the time of {self.kind!r}"
        _check_name("the kind of a collective", self.kind)
        _check_count(f"{where}: members", self.members)
        _check_positive(f"{where}: latency_s", self.latency_s, or_zero=True)
        _check_positive(f"{where}: bytes_per_s", self.bytes_per_s)
        if self.queued_s is not None:
            _check_positive(f"{where}: queued_s", self.queued_s, or_zero=True)


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured on devices of peaks and rings don't tell; without it these are all that is known.

    kernel_s: seconds that a kernel takes however little it does; library_s: what one takes that the compiler doesn't
    write itself, which are contractions and reductions. simple_s and costly_s: seconds per element of an
    addition and the like, and of an exponential and the like, in element-wise kernels that memory does not slow down.
    bytes_per_s: what kernels other than matmuls and convolutions read and write, copies into another order among them.
    operand_bytes_per_s: what contractions read and write beside their arithmetic, which includes bringing operands into
    blocks; None: the memory's bandwidth. columns_s: seconds per element of both sides that a matmul takes longer if it
    reads its left side by columns; window_s: the same of a convolution that makes the gradient of a window, beside
    copies of both sides. odd_tap_s: seconds that a convolution over an odd number of channels, such as 3, takes longer
    for each position of its result and each of its window, as its patches are then put together one by one.
    calls: collectives inside a host, instead of the formulas for rings. joined: the kinds that the compiler puts
    together into few calls where they don't wait for each other.
    """

    kernel_s: float
    simple_s: float
    costly_s: float
    bytes_per_s: float
    library_s: float = 0.0
    operand_bytes_per_s: float | None = None
    columns_s: float = 0.0
    window_s: float = 0.0
    odd_tap_s: float = 0.0
    calls: tuple[CallTime, ...] = ()
    joined: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what in ("kernel_s", "simple_s", "costly_s", "library_s", "columns_s", "window_s", "odd_tap_s"):
            _check_positive(f"a profile's {what}", getattr(self, what), or_zero=True)
        _check_positive("a profile's bytes_per_s", self.bytes_per_s)
        if self.operand_bytes_per_s is not None:
            _check_positive("a profile's operand_bytes_per_s", self.operand_bytes_per_s)
        found = [(call.kind, call.members) for call in self.calls]
        if found != sorted(set(found)):
            raise ClusterError(f"a profile's calls must be sorted by kind and members, each once, found {found}")

    def call(self, kind: str, members: int) -> CallTime | None:
        """The entry of this kind with the most members that the group has, else of the fewest."""
        mine = [call for call in self.calls if call.kind == kind]
        return next((call for call in reversed(mine) if call.members <= members), mine[0] if mine else None)


@dataclass(frozen=True, slots=True)
class _Groups:
    """The groups of a mesh that communicate at the same time: `rings_per_host` of them leave the busiest host."""

    members: int
    hosts: int
    rings_per_host: int


@lru_cache(maxsize=4096)
def _groups(devices_per_host: int, mesh_shape: tuple[int, ...], axes: tuple[int, ...]) -> _Groups:
    strides = [math.prod(mesh_shape[axis + 1 :]) for axis in range(len(mesh_shape))]
    hosts_of: defaultdict[int, set[int]] = defaultdict(set)
    for device in range(math.prod(mesh_shape)):
        first = device - sum(device // strides[a] % mesh_shape[a] * strides[a] for a in axes)
        hosts_of[first].add(device // devices_per_host)
    rings = Counter(host for hosts in hosts_of.values() if len(hosts) > 1 for host in hosts)
    members = math.prod(mesh_shape[a] for a in axes)
    return _Groups(members, max(map(len, hosts_of.values())), max(rings.values(), default=0))


@dataclass(frozen=True, slots=True)
class Cluster:
    """`hosts` equal hosts of `devices_per_host` equal devices, numbered host by host.

    `intra_host` is the link of a group that fills a host. Where a smaller group reaches fewer wires, `small_groups`
    pairs a number of members with its bandwidth: a group takes the entry of the most members that it has.
    `inter_host` is one device's share of its host's network, when all devices of the host send at once.
    `exchange_groups` is like `small_groups`, up to a whole host, for all-to-alls: where not every device has a wire to
    every other one, these are slower than rings. `profile` is what `Cluster.local` measured beyond that.

    Example: `Cluster("pair", 2, 4, device, Link(100e9, 3e-6), Link(3e9, 14e-6), ("measured by me",))`.
    """

    name: str
    hosts: int
    devices_per_host: int
    device: Device
    intra_host: Link
    inter_host: Link
    sources: tuple[str, ...]
    small_groups: tuple[tuple[int, float], ...] = ()
    profile: Profile | None = None
    exchange_groups: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _check_name("the cluster's name", self.name)
        where = f"cluster {self.name!r}: "
        _check_count(f"{where}hosts", self.hosts)
        _check_count(f"{where}devices_per_host", self.devices_per_host)
        for source in self.sources:
            _check_name(f"{where}each source", source)
        self._check_groups(f"{where}small_groups", self.small_groups, self.devices_per_host - 1)
        self._check_groups(f"{where}exchange_groups", self.exchange_groups, self.devices_per_host)

    def _check_groups(self, what: str, groups: tuple[tuple[int, float], ...], most: int) -> None:
        for members, bandwidth in groups:
            _check_count(f"{what}: the members", members)
            _check_positive(f"{what}: the bandwidth of a group of {members}", bandwidth)
        counts = [members for members, _ in groups]
        if counts != sorted(set(counts)) or (counts and not 2 <= counts[0] <= counts[-1] <= most):
            raise ClusterError(f"{what} must count 2 to {most} members, rising, found {counts}")

    def __str__(self) -> str:
        device = self.device
        dtype = next(d for d in ("bfloat16", "float16", "float32") if d in dict(device.peak_flops))
        text = (
            f"{self.name}: {counted(self.hosts, 'host')} × {self.devices_per_host} {device.name} "
            f"({device.memory_bytes / _GIB:.4g} GiB, {_short(device.flops_per_s(dtype))}FLOP/s {dtype}), "
            f"{_short(self.intra_host.bandwidth_bytes_per_s)}B/s per device in a host"
        )
        return text if self.hosts == 1 else f"{text}, {_short(self.inter_host.bandwidth_bytes_per_s)}B/s between hosts"

    @property
    def num_devices(self) -> int:
        return self.hosts * self.devices_per_host

    def part(self, hosts: int, devices_per_host: int) -> Cluster:
        """Some hosts of this cluster, or some devices of one host, as a cluster of their own."""
        if not (1 <= hosts <= self.hosts and 1 <= devices_per_host <= self.devices_per_host):
            raise ClusterError(
                f"cluster {self.name!r} has {counted(self.hosts, 'host')} of {self.devices_per_host} devices, "
                f"asked for {hosts} of {devices_per_host}"
            )
        if devices_per_host == self.devices_per_host:
            return self if hosts == self.hosts else replace(self, hosts=hosts)
        inside = self._inside(devices_per_host)
        return replace(
            self,
            hosts=hosts,
            devices_per_host=devices_per_host,
            intra_host=inside,
            small_groups=tuple((n, b) for n, b in self.small_groups if n < devices_per_host),
            exchange_groups=tuple((n, b) for n, b in self.exchange_groups if n <= devices_per_host),
        )

    def axis_link(self, mesh_shape: tuple[int, ...], axis: int) -> Link:
        """`group_link` for the groups along one mesh axis."""
        return self.group_link(mesh_shape, (axis,))

    def group_link(self, mesh_shape: tuple[int, ...], axes: tuple[int, ...]) -> Link:
        """The link that rings over `axes` of a mesh see while all groups of these axes communicate at once.

        The mesh numbers the devices row-major from the first device of a host. If a group spans hosts, its ring
        enters and leaves each host once, so a host's network is shared by the rings that cross it, not by its devices:
        on 2 hosts × 8 each ring over axis 0 of mesh (2, 8) gets an eighth of it, the ring over mesh (16,) all of it.
        That ring is still no faster than the wires inside a host, and only `hosts - 1` of its `members - 1` steps are
        as slow as the network, as in NCCL's `src/graph/tuning.cc` (`nInterSteps`).
        """
        self._check_mesh(mesh_shape, axes)
        groups = _groups(self.devices_per_host, tuple(mesh_shape), tuple(axes))
        if groups.hosts == 1:
            return self._inside(groups.members)
        bandwidth = self.inter_host.bandwidth_bytes_per_s * (self.devices_per_host / groups.rings_per_host)
        if groups.members == groups.hosts:
            return Link(bandwidth, self.inter_host.latency_s)
        inside = self._inside(math.ceil(groups.members / groups.hosts))
        slow, steps = groups.hosts - 1, groups.members - 1
        latency = (slow * self.inter_host.latency_s + (steps - slow) * inside.latency_s) / steps
        return Link(min(bandwidth, inside.bandwidth_bytes_per_s), latency)

    def exchange_link(self, mesh_shape: tuple[int, ...], axes: tuple[int, ...]) -> Link:
        """`group_link` for all-to-alls: no faster than what `exchange_groups` says of the members in one host."""
        link = self.group_link(mesh_shape, axes)
        groups = _groups(self.devices_per_host, tuple(mesh_shape), tuple(axes))
        inside = math.ceil(groups.members / groups.hosts)
        known = [bandwidth for count, bandwidth in self.exchange_groups if count <= inside]
        return Link(min(link.bandwidth_bytes_per_s, known[-1]), link.latency_s) if known else link

    def peer_link(self, source: int, destination: int) -> Link:
        """The link of messages between two devices, while all devices of the two hosts send such messages."""
        for device in (source, destination):
            if not 0 <= device < self.num_devices:
                raise ClusterError(f"cluster {self.name!r} has devices 0 to {self.num_devices - 1}, asked for {device}")
        same_host = source // self.devices_per_host == destination // self.devices_per_host
        return self._inside(2) if same_host else self.inter_host

    def call(self, kind: str, mesh_shape: tuple[int, ...], axes: tuple[int, ...]) -> CallTime | None:
        """What `profile` says of a collective over `axes`; None where it says nothing or a group spans hosts."""
        groups = _groups(self.devices_per_host, tuple(mesh_shape), tuple(axes))
        return self.profile.call(kind, groups.members) if self.profile and groups.hosts == 1 else None

    def _inside(self, members: int) -> Link:
        if members < self.devices_per_host:
            for count, bandwidth in reversed(self.small_groups):
                if count <= members:
                    return Link(bandwidth, self.intra_host.latency_s)
        return self.intra_host

    def _check_mesh(self, mesh_shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
        where = f"cluster {self.name!r}: mesh {mesh_shape}"
        for size in mesh_shape:
            _check_count(f"{where}: each size", size)
        if math.prod(mesh_shape) > self.num_devices:
            raise ClusterError(f"{where} has {math.prod(mesh_shape)} devices, the cluster only {self.num_devices}")
        if len(set(axes)) < len(axes) or not all(0 <= axis < len(mesh_shape) for axis in axes):
            raise ClusterError(f"{where} has axes 0 to {len(mesh_shape) - 1}, each usable once, asked for {axes}")

    def to_json(self) -> dict[str, Any]:
        """A value of plain dicts, lists, texts and numbers; `from_json` is its inverse."""
        data = asdict(self)
        data["device"]["peak_flops"] = dict(self.device.peak_flops)
        data["sources"] = list(self.sources)
        data["small_groups"] = [list(pair) for pair in self.small_groups]
        data["exchange_groups"] = [list(pair) for pair in self.exchange_groups]
        if self.profile is None:
            del data["profile"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cluster:
        """The cluster that `to_json` wrote. Raises `ClusterError` if anything is missing or has another form."""
        try:
            device = dict(data["device"])
            peak_flops = tuple(device.pop("peak_flops").items())
            found = cls(
                name=data["name"],
                hosts=data["hosts"],
                devices_per_host=data["devices_per_host"],
                device=Device(peak_flops=peak_flops, **device),
                intra_host=Link(**data["intra_host"]),
                inter_host=Link(**data["inter_host"]),
                sources=tuple(data["sources"]),
                small_groups=_pairs(data["small_groups"]),
                exchange_groups=_pairs(data.get("exchange_groups", ())),
                profile=_profile(data.get("profile"), device),
            )
        except ClusterError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ClusterError(
                f"this is no cluster as Cluster.to_json writes it ({type(error).__name__}: {error}); "
                "compare it with what `alpa-like clusters dgx-a100 --json` writes"
            ) from error
        if unknown := sorted(data.keys() - {f.name for f in fields(cls)}):
            raise ClusterError(f"a cluster has no {unknown[0]!r}; take it out, or correct the name")
        return found

    @classmethod
    def local(cls, num_devices: int | None = None, *, recalibrate: bool = False) -> Cluster:
        """The first `num_devices` (default: all) of `jax.devices()`, measured once and then read from a cache.

        See `alpa_like.calibrate` for what is measured and where the cache is. `recalibrate=True` measures anew.
        """
        from alpa_like.calibrate import local_cluster  # imports JAX, which this module must not need

        return local_cluster(num_devices, recalibrate=recalibrate)

    @staticmethod
    def presets() -> dict[str, Callable[..., Cluster]]:
        """The machines known by name; each value takes `hosts`, 1 if not given."""
        return {
            "p3.16xlarge": Cluster.p3_16xlarge,
            "dgx-a100": Cluster.dgx_a100,
            "dgx-h100": Cluster.dgx_h100,
            "dgx-h200": Cluster.dgx_h200,
            "tpu-v4": Cluster.tpu_v4,
            "tpu-v5e": Cluster.tpu_v5e,
            "tpu-v5p": Cluster.tpu_v5p,
        }

    @classmethod
    def p3_16xlarge(cls, hosts: int = 1) -> Cluster:
        """AWS p3.16xlarge: 8 V100 SXM2 16 GB in NVLink's hybrid cube mesh, 25 Gbit/s Ethernet per host.

        A V100 has 6 NVLinks: 2 lead to its best neighbour, 4 into its half of the cube, so a ring of 2, 4 or 8 uses
        2, 4 or 6. (Pairs such as GPUs 0 and 1 share one link only; groups that the scheduler places badly are slower.)
        In an all-to-all each pair of GPUs has its own links or none, so the measured bandwidth does not grow with them.
        Rings take NCCL's 20 GB/s per link; what is fitted to Aceso's measurements are `exchange_groups` and the shares
        in `_V100`. `python -m benchmarks.v100_fidelity` compares the predictions with that data.
        """
        return cls(
            name="p3.16xlarge",
            hosts=hosts,
            devices_per_host=8,
            device=_V100,
            # Steps of NCCL's Simple protocol: all-reduces of 1 MB on 2 and on 8 V100s differ by 3.4 µs per step.
            intra_host=Link(6 * 20e9, 3.4e-6),
            # 25 Gbit/s shared by 8 devices. The latency is that of an InfiniBand step; Ethernet with TCP is slower.
            inter_host=Link(25e9 / 8 / 8, 14e-6),
            sources=(
                "NVIDIA, Tesla V100 data sheet (2018), table 'Specifications', column SXM2: FLOP/s, 16 GB, 900 GB/s",
                "AWS, EC2 P3 launch post and instance page (2017): 8 V100, NVLink, 25 Gbit/s",
                "NVIDIA, DGX-1 with Tesla V100 white paper (WP-08437), figure of the hybrid cube mesh: links per pair",
                "NVIDIA/nccl, src/graph/topo.h: SM70_NVLINK_BW = 20 GB/s",
                "NVIDIA/nccl, src/graph/tuning.cc, hwLat, Ring/Simple: 3.4 µs per step on NVLink, 14 µs on the network",
                "Z. Liu et al., Aceso (EuroSys'24), artifact, profiles on 8 V100 with NVLink: all-to-all times, and "
                "times of GPT layers (1.3B) in fp16, from which the shares of the peaks come",
            ),
            small_groups=((2, 2 * 20e9), (4, 4 * 20e9)),
            exchange_groups=((2, 34e9), (4, 50e9), (8, 45e9)),
        )

    @classmethod
    def dgx_a100(cls, hosts: int = 1) -> Cluster:
        """NVIDIA DGX A100 640 GB: 8 A100 SXM 80 GB on NVSwitch, one 200 Gbit/s InfiniBand port per GPU."""
        return cls(
            name="dgx-a100",
            hosts=hosts,
            devices_per_host=8,
            device=_A100,
            intra_host=Link(230e9, _NVLINK_STEP_S),  # line rate 300 GB/s
            inter_host=Link(200e9 / 8, _NETWORK_STEP_S),  # line rate
            sources=(
                "NVIDIA, A100 data sheet (1758950), column A100 80GB SXM: FLOP/s without sparsity, 80 GB, 2039 GB/s",
                "NVIDIA, DGX A100 data sheet: 8 single-port ConnectX-6, 200 Gbit/s each",
                "NVIDIA/nccl-tests issue 149 (maintainer, 2023-07-05): 12 links of 25 GB/s give about 230 GB/s",
                _NCCL_LATENCY,
                f"{_MAMF}: A100 SXM 271.2 of 312 TFLOP/s",
            ),
        )

    @classmethod
    def dgx_h100(cls, hosts: int = 1) -> Cluster:
        """NVIDIA DGX H100: 8 H100 SXM 80 GB on NVSwitch, one 400 Gbit/s InfiniBand port per GPU."""
        return cls(
            name="dgx-h100",
            hosts=hosts,
            devices_per_host=8,
            device=_H100,
            intra_host=_HOPPER_NVLINK,
            inter_host=_HOPPER_NETWORK,
            sources=(
                "NVIDIA, H100 data sheet, column H100 SXM, halved where it shows sparsity: FLOP/s, 80 GB, 3.35 TB/s",
                "NVIDIA, DGX H100 data sheet: 8 ConnectX-7 ports, 400 Gbit/s each",
                *_HOPPER_LINK_SOURCES,
                f"{_MAMF}: H100 SXM 794.5 of 989 TFLOP/s",
            ),
        )

    @classmethod
    def dgx_h200(cls, hosts: int = 1) -> Cluster:
        """NVIDIA DGX H200: the DGX H100 with 141 GB of faster memory per GPU."""
        return cls(
            name="dgx-h200",
            hosts=hosts,
            devices_per_host=8,
            device=_H200,
            intra_host=_HOPPER_NVLINK,
            inter_host=_HOPPER_NETWORK,
            sources=(
                "NVIDIA, H200 data sheet, column H200 SXM, halved where it shows sparsity: FLOP/s, 141 GB, 4.8 TB/s",
                "NVIDIA, DGX H200 data sheet: 8 ConnectX-7 ports, 400 Gbit/s each",
                *_HOPPER_LINK_SOURCES,
                f"{_MAMF}: the H200 is like the H100, 794.5 of 989 TFLOP/s",
            ),
        )

    @classmethod
    def tpu_v4(cls, hosts: int = 1) -> Cluster:
        """Cloud TPU v4: hosts of 4 chips (2×2×1) in a 3D torus. See `_tpu` for what the links assume."""
        return _tpu("tpu-v4", hosts, 4, _TPU_V4, 45e9, "Google Cloud, 'TPU v4': 275 TFLOP/s, 32 GiB, 1200 GB/s")

    @classmethod
    def tpu_v5e(cls, hosts: int = 1) -> Cluster:
        """Cloud TPU v5e: hosts of 8 chips (4×2) in a 2D torus of at most 16×16.

        Cloud's machines of multi-host slices show 4 chips each: `dataclasses.replace(c, devices_per_host=4)`.
        """
        return _tpu("tpu-v5e", hosts, 8, _TPU_V5E, 45e9, "Google Cloud, 'TPU v5e': 197 TFLOP/s, 16 GB, 819 GB/s")

    @classmethod
    def tpu_v5p(cls, hosts: int = 1) -> Cluster:
        """Cloud TPU v5p: hosts of 4 chips (2×2×1) in a 3D torus. See `_tpu` for what the links assume."""
        return _tpu("tpu-v5p", hosts, 4, _TPU_V5P, 90e9, "Google Cloud, 'TPU v5p': 459 TFLOP/s, 95 GiB, 2765 GB/s")


def _profile(data: dict[str, Any] | None, device: dict[str, Any]) -> Profile | None:
    """Older files have no `bytes_per_s`, where the memory's bandwidth stands in, or `turned`, which priced copies."""
    if data is None:
        return None
    figures = {"bytes_per_s": device["memory_bandwidth_bytes_per_s"], **data}
    figures.pop("turned", None)
    figures["calls"] = tuple(CallTime(**call) for call in data["calls"])
    figures["joined"] = tuple(data["joined"])
    return Profile(**figures)


def _pairs(groups: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((members, bandwidth) for members, bandwidth in groups)


def _short(value: float) -> str:
    """A number and an SI prefix, such as `125 T` or `391 M`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:.4g} "


# Seconds per ring step of NCCL's protocol for large messages; small ones are faster (0.6 µs and 2.7 µs).
# Latency decides for small messages only, and for those NCCL takes its low-latency protocol (LL).
_NVLINK_STEP_S = 0.6e-6
_NETWORK_STEP_S = 2.7e-6
_NCCL_LATENCY = "NVIDIA/nccl, src/graph/tuning.cc, hwLat, Ring/LL: 0.6 µs per step on NVLink, 2.7 µs on the network"

_MAMF = "S. Bekman, Machine Learning Engineering, 'Maximum Achievable Matmul FLOPS comparison table' (2025), BF16"

_HOPPER_NVLINK = Link(370e9, _NVLINK_STEP_S)  # line rate 450 GB/s
_HOPPER_NETWORK = Link(400e9 / 8, _NETWORK_STEP_S)  # line rate
_HOPPER_LINK_SOURCES = (
    "NVIDIA/nccl-tests issue 212 (maintainer, 2024-05-06): NVLink's 450 GB/s give 370 GB/s in a ring, 480 GB/s for an "
    "all-reduce in the switch (NVLS), which is not counted on here",
    "J. Austin et al., How to Scale Your Model, part 12, 'Empirical measurements': 370 GB/s on 8 H100",
    _NCCL_LATENCY,
)

# "GB" of V100, A100 and H100 are GiB. The peak of float64 on A100 and H100 is that of its tensor cores.

# The shares of the V100 are fitted to Aceso's times of a GPT-1.3B layer's operators, see `benchmarks/v100_fidelity`.
# Its matmuls reach 0.69 of the peak forward and 0.81 backward, 0.76 over a step. Kernels that only move data reach
# 0.75 of the bandwidth on average: softmax 0.73, dropout 0.78. The SMs have no asynchronous copies (they came with
# the A100), so half of the shorter of arithmetic and traffic stays visible.
_V100 = Device(
    name="V100-SXM2-16GB",
    peak_flops=(("float16", 125e12), ("float32", 15.7e12), ("float64", 7.8e12)),  # no bfloat16 units
    memory_bytes=16 * _GIB,
    memory_bandwidth_bytes_per_s=900e9,
    flops_efficiency=0.76,
    memory_efficiency=0.75,
    exposed=0.5,
)

_A100 = Device(
    name="A100-SXM4-80GB",
    peak_flops=(
        ("bfloat16", 312e12),
        ("float16", 312e12),
        ("tensorfloat32", 156e12),
        ("float32", 19.5e12),
        ("float64", 19.5e12),
        ("int8", 624e12),
    ),
    memory_bytes=80 * _GIB,
    memory_bandwidth_bytes_per_s=2039e9,
    flops_efficiency=0.87,
)

_HOPPER_FLOPS = (
    ("float8_e4m3fn", 1979e12),
    ("bfloat16", 989e12),
    ("float16", 989e12),
    ("tensorfloat32", 494.5e12),
    ("float32", 67e12),
    ("float64", 67e12),
    ("int8", 1979e12),
)

_H100 = Device("H100-SXM5-80GB", _HOPPER_FLOPS, 80 * _GIB, 3.35e12, flops_efficiency=0.80)

# 141 GB taken as decimal, to be on the safe side: the driver shows about 140 GiB.
_H200 = Device("H200-SXM5-141GB", _HOPPER_FLOPS, 141 * 10**9, 4.8e12, flops_efficiency=0.80)

# We know of no table of the matmul FLOP/s that these chips reach. Matmuls on TPU v2 took 96 ms where the peak allows
# 95.6 (How to Scale Your Model, part 9), whole train steps on v5e reach 0.67 (MaxText, configs/v5e). 0.9 is our guess.
_TPU_EFFICIENCY = 0.9

_TPU_V4 = Device(
    name="TPU-v4",
    peak_flops=(("bfloat16", 275e12), ("float32", 275e12), ("int8", 275e12)),
    memory_bytes=32 * _GIB,
    memory_bandwidth_bytes_per_s=1200e9,
    flops_efficiency=_TPU_EFFICIENCY,
)

_TPU_V5E = Device(
    name="TPU-v5e",
    peak_flops=(("bfloat16", 197e12), ("float32", 197e12), ("int8", 393e12)),
    memory_bytes=16 * _GIB,
    memory_bandwidth_bytes_per_s=819e9,
    flops_efficiency=_TPU_EFFICIENCY,
)

_TPU_V5P = Device(
    name="TPU-v5p",
    peak_flops=(("bfloat16", 459e12), ("float32", 459e12), ("float8_e4m3fn", 459e12), ("int8", 918e12)),
    memory_bytes=95 * _GIB,
    memory_bandwidth_bytes_per_s=2765e9,
    flops_efficiency=_TPU_EFFICIENCY,
)


def _tpu(name: str, hosts: int, chips_per_host: int, chip: Device, one_way: float, data_sheet: str) -> Cluster:
    """A slice whose chips are joined by ICI alone, inside a host and across hosts; `one_way` is bytes/s of one wire.

    A ring over one axis of the torus uses two wires per chip, one in each direction round the ring, so its bandwidth
    is twice `one_way`; two neighbours share one wire. An axis without wraparound (slices smaller than 4×4×4, or than
    16 on v5e) reaches half of that, a group laid over two torus axes more.
    """
    step_s = 1e-6
    return Cluster(
        name=name,
        hosts=hosts,
        devices_per_host=chips_per_host,
        device=chip,
        intra_host=Link(2 * one_way, step_s),
        inter_host=Link(2 * one_way, step_s),
        sources=(
            data_sheet,
            "J. Austin et al., How to Scale Your Model, part 2, table 'TPU specs': int8, chips per host",
            f"J. Austin et al., How to Scale Your Model, part 2, table 'ICI BW/link': {one_way / 1e9:g} GB/s one-way",
            "J. Austin et al., How to Scale Your Model, part 2, question 5: about 1 µs per hop",
            "JAX documentation, 'Matmul precision': the default float32 matmul of TPUs is one bfloat16 pass",
            "J. Austin et al., How to Scale Your Model, part 9, and MaxText configs/v5e: bounds of flops_efficiency",
        ),
        small_groups=((2, one_way),),
    )
