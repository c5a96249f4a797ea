"""Pictures from MuJoCo on a computer without a screen: choosing OpenGL, and a renderer made for small frames on a CPU.

`prepare_gl` must run before `mujoco` is imported for the first time, which is why mujoco is imported inside functions.

What makes it fast (a software rasteriser is bound by vertices, lights and texels, not by a 64 px frame): no
multisampling, shadows, reflections or sky; one light, at the camera; flat colours instead of textures; coarse spheres
and cylinders; planes of four squares; and the robot's heavy meshes, up to 13,500 triangles each, drawn as capsules or
convex hulls.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from bridge.backend import BackendError, UInt8

# EGL_PLATFORM_DEVICE_EXT, from the extension EGL_EXT_platform_device.
_EGL_PLATFORM_DEVICE = 0x313F
_MAX_EGL_DEVICES = 16
_MAX_GEOMS = 1000
_ONE_SQUARE_M = 1e6
_PROBE_XML = "<mujoco><worldbody><geom size='.5'/></worldbody></mujoco>"


class View(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a free camera stands. The defaults see the table of MetaWorld from a corner, over the robot's shoulder."""

    lookat: tuple[float, float, float] = (0.02, 0.66, 0.12)
    """The point in the middle of the picture, metres."""
    distance: Annotated[float, Meta(gt=0)] = 1.15
    """From that point, metres."""
    azimuth: float = 140.0
    """Around the vertical, degrees."""
    elevation: float = -38.0
    """Above the horizon if negative (MuJoCo's sign), degrees."""
    fovy: Annotated[float, Meta(gt=0, lt=180)] = 38.0
    """Vertical field of view, degrees."""


class Camera(Struct, frozen=True, forbid_unknown_fields=True):
    """A square camera; its image is uint8 `[size_px, size_px, 3]`."""

    name: str
    size_px: Annotated[int, Meta(ge=8, le=1024)] = 64
    view: View = View()


def prepare_gl() -> str:
    """Choose how MuJoCo opens OpenGL by setting MUJOCO_GL, and return its value (empty: left to MuJoCo).

    A value set by the user stays. Otherwise, on Linux, EGL where a device opens, else OSMesa where its library is.
    Software rendering is told to stay in the calling thread: a thread of its own is waited for once a frame, for
    milliseconds where other workers keep the cores busy.
    """
    os.environ.setdefault("LP_NUM_THREADS", "0")
    chosen = os.environ.get("MUJOCO_GL", "").lower().strip()
    if chosen or sys.platform != "linux":
        return chosen
    # PyOpenGL can load one platform in a process, so the choice is made without it and not by trying one after another.
    platform = os.environ.get("PYOPENGL_PLATFORM", "").lower()
    if platform in ("", "egl") and _egl_device_opens():
        chosen = "egl"
    elif platform in ("", "osmesa") and any(_loads(f"libOSMesa.so{version}") for version in (".8", ".6", "")):
        chosen = "osmesa"
    if chosen:
        os.environ["MUJOCO_GL"] = chosen
    return chosen


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _egl_device_opens() -> bool:
    """Whether some EGL device can be initialised without a display server; the test MuJoCo makes later."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_address or not display_address:
        return False
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query_address)
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_address)
    devices = (ctypes.c_void_p * _MAX_EGL_DEVICES)()
    count = ctypes.c_int(0)
    if not query(_MAX_EGL_DEVICES, devices, ctypes.byref(count)):
        return False
    displays = (get_display(_EGL_PLATFORM_DEVICE, device, None) for device in devices[: count.value])
    return any(display and egl.eglInitialize(display, None, None) for display in displays)


def open_gl(size_px: int) -> Any:
    """An OpenGL context of MuJoCo, current in this thread, for frames of up to `size_px`; free it with `.free()`.

    Raises `BackendError` that says what to install where no context can be opened or it cannot draw.
    """
    chosen = prepare_gl()
    try:
        import mujoco

        if chosen in ("egl", "osmesa"):
            # Not mujoco.GLContext: that was fixed when mujoco was first imported, perhaps before `prepare_gl`.
            context = importlib.import_module(f"mujoco.{chosen}").GLContext(size_px, size_px)
        else:
            context = mujoco.GLContext(size_px, size_px)
        context.make_current()
        model = mujoco.MjModel.from_xml_string(_PROBE_XML)
        mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value).free()
    # PyOpenGL and MuJoCo raise whatever they stumble over when a library is missing, down to AttributeError on None.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "mujoco":
            raise BackendError("mujoco is not installed; run pip install 'fieldtune[metaworld]'") from error
        setting = f"MUJOCO_GL={chosen}" if chosen else "MUJOCO_GL is not set"
        raise BackendError(
            f"cannot draw: no OpenGL context ({setting}): {type(error).__name__}: {error}. "
            "Install a software driver (Debian: apt-get install libegl1 libegl-mesa0, or libosmesa6), leave MUJOCO_GL "
            "unset to have one chosen, and see `fieldtune doctor`"
        ) from error
    return context


def check_gl() -> str:
    """Draw one picture and say with what, e.g. `egl: llvmpipe (LLVM 15.0.6, 256 bits)`. Raises `BackendError`."""
    context = open_gl(32)
    try:
        import mujoco

        model = mujoco.MjModel.from_xml_string(_PROBE_XML)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        renderer = Renderer(model, [Camera("probe", 32, View(lookat=(0, 0, 0), distance=3.0))], context)
        image = renderer.render(data)["probe"]
        gl = importlib.import_module("OpenGL.GL")
        driver = gl.glGetString(gl.GL_RENDERER).decode()
        renderer.close()
    finally:
        context.free()
    name = os.environ.get("MUJOCO_GL") or "MuJoCo's default"
    if len(np.unique(image)) < 2:
        raise BackendError(f"{name}: {driver} opens but draws an empty picture; try another driver by MUJOCO_GL")
    return f"{name}: {driver}"


def simplify(model: Any, capsules: Iterable[str] = ()) -> None:
    """Change how a MuJoCo model looks so that it draws fast; nothing that its physics reads is changed.

    Meshes named in `capsules` become capsules of their size, where they take no part in collisions.
    """
    import mujoco

    capsule_ids = {model.mesh(name).id for name in capsules}
    for geom in range(model.ngeom):
        collides = model.geom_contype[geom] or model.geom_conaffinity[geom]
        is_mesh = model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH
        if is_mesh and not collides and model.geom_dataid[geom] in capsule_ids:
            _make_capsule(model, geom)
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_PLANE:
            # The spacing of the squares it is drawn of, up to 200 x 200: its only use. Lit from afar, all look alike.
            model.geom_size[geom, 2] = _ONE_SQUARE_M
    for material in range(model.nmat):
        texture = model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB]
        if texture >= 0:
            model.mat_rgba[material, :3] *= _mean_colour(model, texture)
            model.mat_texid[material] = -1
    # No texture is in use now: the driver gets one texel of each, and no shadow map, which saves 100 MB a model.
    model.tex_type[:] = mujoco.mjtTexture.mjTEXTURE_2D
    model.tex_height[:] = model.tex_width[:] = 1
    model.vis.quality.shadowsize = 0
    model.mat_reflectance[:] = 0.0
    model.light_active[:] = 0
    model.vis.headlight.active = 1
    model.vis.headlight.ambient[:] = 0.45
    model.vis.headlight.diffuse[:] = 0.6
    model.vis.headlight.specular[:] = 0.0
    model.vis.quality.offsamples = 0
    model.vis.quality.numslices, model.vis.quality.numstacks, model.vis.quality.numquads = 12, 8, 1


def _make_capsule(model: Any, geom: int) -> None:
    """Turn a mesh geom into a capsule along the longest side of its bounding box."""
    import mujoco

    centre, half = model.geom_aabb[geom, :3].copy(), model.geom_aabb[geom, 3:].copy()
    long_axis = int(np.argmax(half))
    radius = float(np.sqrt(np.prod(np.delete(half, long_axis))))
    rotation, along, quat = np.zeros(9), np.zeros(4), np.zeros(4)
    mujoco.mju_quat2Mat(rotation, model.geom_quat[geom])
    mujoco.mju_quatZ2Vec(along, np.eye(3)[long_axis])
    mujoco.mju_mulQuat(quat, model.geom_quat[geom], along)
    model.geom_pos[geom] += rotation.reshape(3, 3) @ centre
    model.geom_quat[geom] = quat
    model.geom_type[geom] = mujoco.mjtGeom.mjGEOM_CAPSULE
    model.geom_size[geom] = radius, max(half[long_axis] - radius, 1e-3), 0.0
    model.geom_dataid[geom] = -1


def _mean_colour(model: Any, texture: int) -> Any:
    """Mean red, green and blue of a texture, 0 to 1."""
    channels = int(model.tex_nchannel[texture])
    size = int(model.tex_height[texture]) * int(model.tex_width[texture]) * channels
    start = int(model.tex_adr[texture])
    texels = np.asarray(model.tex_data[start : start + size]).reshape(-1, channels)
    return texels[:, :3].mean(axis=0) / 255.0


class Renderer:
    """Draws one model from one or more free cameras. Several renderers may share a context, in one thread."""

    def __init__(self, model: Any, cameras: Sequence[Camera], context: Any) -> None:
        """`context` comes from `open_gl` and must outlive the renderer."""
        import mujoco

        self._mujoco = mujoco
        self._model = model
        self._context = context
        context.make_current()
        largest_px = max(camera.size_px for camera in cameras)
        model.vis.global_.offwidth = model.vis.global_.offheight = largest_px
        self._gpu = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        self._scene = mujoco.MjvScene(model, _MAX_GEOMS)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG"):
            self._scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        self._option = mujoco.MjvOption()
        self._option.flags[mujoco.mjtVisFlag.mjVIS_CONVEXHULL] = 1
        self._perturb = mujoco.MjvPerturb()
        self._views: list[tuple[Camera, Any, Any]] = []
        for camera in cameras:
            free = mujoco.MjvCamera()
            free.type = mujoco.mjtCamera.mjCAMERA_FREE.value
            free.lookat[:] = camera.view.lookat
            free.distance, free.azimuth = camera.view.distance, camera.view.azimuth
            free.elevation = camera.view.elevation
            self._views.append((camera, free, mujoco.MjrRect(0, 0, camera.size_px, camera.size_px)))

    def render(self, data: Any) -> dict[str, UInt8]:
        """Images uint8 `[size_px, size_px, 3]` by camera name; `data` must have gone through `mj_forward`."""
        mujoco = self._mujoco
        self._context.make_current()
        # Every time: another renderer of this context has bound a frame buffer of its own since.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._gpu)
        images: dict[str, UInt8] = {}
        for camera, free, viewport in self._views:
            self._model.vis.global_.fovy = camera.view.fovy
            everything = mujoco.mjtCatBit.mjCAT_ALL.value
            mujoco.mjv_updateScene(self._model, data, self._option, self._perturb, free, everything, self._scene)
            mujoco.mjr_render(viewport, self._scene, self._gpu)
            image = np.empty((camera.size_px, camera.size_px, 3), np.uint8)
            mujoco.mjr_readPixels(image, None, viewport, self._gpu)
            images[camera.name] = np.ascontiguousarray(image[::-1])  # OpenGL's first row is the lowest
        return images

    def close(self) -> None:
        """Free what lies in the driver; idempotent."""
        if self._gpu is not None:
            self._context.make_current()
            self._gpu.free()
            self._gpu = None
