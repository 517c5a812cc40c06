# Imported targets on the libraries of an installed torch: for our own build and, installed, for TorchExtConfig.cmake.
# find_package(Torch) is not used: on a CUDA build of torch it fails without a toolkit, and it probes for a GPU.
#
# In:  TORCH_EXT_TORCH_ROOT            folder of torch (site-packages/torch or an unpacked LibTorch): include/ and lib/
# Out: TorchExt::torch                 everything a C++ program needs
#      TorchExt::torch_python          in addition, for a Python module (where torch has it)
#      TORCH_EXT_TORCH_VERSION, TORCH_EXT_TORCH_CXX_STANDARD, TORCH_EXT_TORCH_CUDA (its CUDA version, "" on a CPU build)
include_guard(DIRECTORY)

if(NOT EXISTS "${TORCH_EXT_TORCH_ROOT}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "no torch in '${TORCH_EXT_TORCH_ROOT}': lib/libtorch_cpu.so is missing. Give "
                      "-DTORCH_EXT_TORCH_ROOT=<folder of torch with include/ and lib/>.")
endif()
set(_torch_include "${TORCH_EXT_TORCH_ROOT}/include")
set(_torch_lib "${TORCH_EXT_TORCH_ROOT}/lib")

set(_torch_version_h "${_torch_include}/torch/headeronly/version.h")  # torch >= 2.9
if(NOT EXISTS "${_torch_version_h}")
  set(_torch_version_h "${_torch_include}/torch/version.h")
endif()
file(STRINGS "${_torch_version_h}" _torch_lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+).*" "\\1.\\2.\\3" TORCH_EXT_TORCH_VERSION
                     "${_torch_lines}")
if(TORCH_EXT_TORCH_VERSION VERSION_GREATER_EQUAL 2.12)
  set(TORCH_EXT_TORCH_CXX_STANDARD 20)
else()
  set(TORCH_EXT_TORCH_CXX_STANDARD 17)
endif()

set(TORCH_EXT_TORCH_CUDA "")
if(EXISTS "${_torch_lib}/libtorch_cuda.so")
  set(TORCH_EXT_TORCH_CUDA "unknown")  # an unpacked LibTorch does not say
  if(EXISTS "${TORCH_EXT_TORCH_ROOT}/version.py")
    file(STRINGS "${TORCH_EXT_TORCH_ROOT}/version.py" _torch_lines REGEX "^cuda.*= '")
    string(REGEX REPLACE ".*'([0-9.]+)'.*" "\\1" TORCH_EXT_TORCH_CUDA "${_torch_lines}")
  endif()
endif()

if(NOT TARGET TorchExt::torch)
  add_library(TorchExt::torch INTERFACE IMPORTED)
  target_include_directories(TorchExt::torch SYSTEM INTERFACE
    "${_torch_include}" "${_torch_include}/torch/csrc/api/include")
  target_compile_features(TorchExt::torch INTERFACE cxx_std_${TORCH_EXT_TORCH_CXX_STANDARD})
  # First, because torch's libraries also export parts of std::filesystem, which crash when called.
  target_link_libraries(TorchExt::torch INTERFACE stdc++)
  foreach(_torch_name torch torch_cpu torch_cuda c10 c10_cuda)
    if(EXISTS "${_torch_lib}/lib${_torch_name}.so")
      add_library(TorchExt::lib${_torch_name} SHARED IMPORTED)
      set_target_properties(TorchExt::lib${_torch_name} PROPERTIES
        IMPORTED_LOCATION "${_torch_lib}/lib${_torch_name}.so")
      target_link_libraries(TorchExt::torch INTERFACE TorchExt::lib${_torch_name})
    endif()
  endforeach()
  # Torch's own libraries need those of the nvidia-* packages beside it; the linker must not take the system's instead.
  file(GLOB _torch_nvidia LIST_DIRECTORIES true "${TORCH_EXT_TORCH_ROOT}/../nvidia/*/lib")
  foreach(_torch_folder IN LISTS _torch_nvidia)
    get_filename_component(_torch_folder "${_torch_folder}" REALPATH)
    target_link_options(TorchExt::torch INTERFACE "LINKER:-rpath-link,${_torch_folder}")
  endforeach()
  if(EXISTS "${_torch_lib}/libtorch_python.so")
    add_library(TorchExt::torch_python SHARED IMPORTED)
    set_target_properties(TorchExt::torch_python PROPERTIES IMPORTED_LOCATION "${_torch_lib}/libtorch_python.so")
  endif()
endif()
