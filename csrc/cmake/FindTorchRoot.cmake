# Where torch is, for our own build: -DTORCH_EXT_TORCH_ROOT, else the interpreter's site-packages/torch. The interpreter
# is -DPython_EXECUTABLE, else that of the active or the project's virtual environment, else what CMake finds.
if(NOT Python_EXECUTABLE AND NOT DEFINED ENV{VIRTUAL_ENV} AND EXISTS ${PROJECT_SOURCE_DIR}/.venv/bin/python)
  set(Python_EXECUTABLE ${PROJECT_SOURCE_DIR}/.venv/bin/python CACHE FILEPATH "")
endif()
set(Python_FIND_VIRTUALENV FIRST)
if(TORCH_EXT_PYTHON)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
elseif(NOT TORCH_EXT_TORCH_ROOT)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
endif()

if(NOT TORCH_EXT_TORCH_ROOT)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0], end='')"
    OUTPUT_VARIABLE root RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: run '${Python_EXECUTABLE} -m pip install "
                        "torch==2.11.0', or give -DTORCH_EXT_TORCH_ROOT=<folder of torch with include/ and lib/>.")
  endif()
  set(TORCH_EXT_TORCH_ROOT ${root} CACHE PATH "" FORCE)
endif()
