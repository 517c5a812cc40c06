# Helpers of our own build. Nothing here is installed.

# Warnings are errors while developing; a user's newer compiler must not break the build of a wheel.
set(TORCH_EXT_CUDA_WARNINGS -Xcompiler=-Wall,-Wextra)
set(werror "")
if(NOT TORCH_EXT_WHEEL)
  set(werror -Werror)
  list(APPEND TORCH_EXT_CUDA_WARNINGS -Werror=all-warnings -Xcompiler=-Werror)
endif()

if(TORCH_EXT_SANITIZE)
  set(CMAKE_CXX_FLAGS_RELEASE "-O1 -g1 -DNDEBUG")
  # vptr needs the type information that torch keeps to itself.
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${TORCH_EXT_SANITIZE}>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize=vptr>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>
                      $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)  # gcc's own advice with sanitizers
  add_link_options(-fsanitize=${TORCH_EXT_SANITIZE})
endif()

find_program(TORCH_EXT_CCACHE ccache)
if(TORCH_EXT_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(launcher ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
      CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} ${TORCH_EXT_CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${launcher})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${launcher})
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fpch-preprocess>)
endif()

function(torch_ext_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra ${werror})
endfunction()

# torch/torch.h takes some 15 s to read: once, for all targets (which therefore share language flags).
function(torch_ext_precompile target)
  target_compile_definitions(${target} PRIVATE TORCH_EXT_WITH_CUDA=${TORCH_EXT_WITH_CUDA})
  if(target STREQUAL "torch_ext")
    target_precompile_headers(${target} PRIVATE ${PROJECT_SOURCE_DIR}/csrc/core/pch.h)
  else()
    target_precompile_headers(${target} REUSE_FROM torch_ext)
    set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)  # programs too need -fPIC, not -fPIE
    target_compile_options(${target} PRIVATE -fPIC)
  endif()
endfunction()

# Half of a file's compile time goes into templates that torch's headers leave to every file. So the files of a room
# (csrc/<area>/<name>) are compiled as one: names in their anonymous namespaces must differ. TORCH_EXT_UNITY=OFF compiles
# file by file, as lint does.
function(torch_ext_unite target)
  if(NOT TORCH_EXT_UNITY)
    return()
  endif()
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  foreach(source IN LISTS ARGN)
    get_filename_component(room ${source} DIRECTORY)
    file(RELATIVE_PATH room ${PROJECT_SOURCE_DIR}/csrc ${room})
    string(REPLACE "/" "_" room ${room})
    set_source_files_properties(${source} PROPERTIES UNITY_GROUP ${room})
  endforeach()
endfunction()

# One program per file, named after it.
function(torch_ext_program source)
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  get_filename_component(folder ${source} DIRECTORY)
  target_include_directories(${name} PRIVATE ${folder} ${PROJECT_SOURCE_DIR}/csrc)
  target_link_libraries(${name} PRIVATE torch_ext torch_ext_kernel_archive ${ARGN})
  torch_ext_warnings(${name})
  torch_ext_precompile(${name})
endfunction()

# Kernels are hidden in the library; tests and benchmarks of them link this copy, of which the linker takes what is used.
add_library(torch_ext_kernel_archive STATIC EXCLUDE_FROM_ALL $<TARGET_OBJECTS:torch_ext_kernels>)
set_target_properties(torch_ext_kernel_archive PROPERTIES LINKER_LANGUAGE CXX)

# Distribution package, a prefix in TORCH_EXT_GTEST_ROOT or CMAKE_PREFIX_PATH, or sources (Debian: /usr/src/googletest).
macro(torch_ext_find_gtest)
  set(TORCH_EXT_GTEST_ROOT "$ENV{TORCH_EXT_GTEST_ROOT}" CACHE PATH "GoogleTest: an install prefix or its sources")
  if(NOT EXISTS "${TORCH_EXT_GTEST_ROOT}/CMakeLists.txt")
    find_package(GTest QUIET HINTS ${TORCH_EXT_GTEST_ROOT})
  endif()
  if(NOT TARGET GTest::gtest_main)
    find_path(gtest_source googletest/CMakeLists.txt HINTS ${TORCH_EXT_GTEST_ROOT} PATHS /usr/src/googletest
              NO_CACHE NO_DEFAULT_PATH)
    if(NOT gtest_source)
      message(FATAL_ERROR "GoogleTest is missing: run 'apt-get install libgtest-dev', set TORCH_EXT_GTEST_ROOT, or "
                          "configure with -DTORCH_EXT_TESTS=OFF.")
    endif()
    set(BUILD_GMOCK OFF)
    set(INSTALL_GTEST OFF)
    add_subdirectory(${gtest_source} gtest EXCLUDE_FROM_ALL SYSTEM)
  endif()
endmacro()

# One program; one ctest entry per file (starting a torch program costs a second), plus one that runs every test whose
# suite was not recognised, so that nothing is left out in silence.
function(torch_ext_add_tests folder)
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${folder}/*.cpp)
  if(NOT sources)
    return()
  endif()
  add_executable(torch_ext_tests ${sources})
  target_include_directories(torch_ext_tests PRIVATE ${folder} csrc)
  target_compile_definitions(torch_ext_tests PRIVATE TORCH_EXT_TEST_DATA_DIR="${PROJECT_SOURCE_DIR}/tests")
  target_link_libraries(torch_ext_tests PRIVATE torch_ext torch_ext_kernel_archive GTest::gtest_main)
  torch_ext_warnings(torch_ext_tests)
  torch_ext_precompile(torch_ext_tests)
  if(TORCH_EXT_SANITIZE)
    set(env "ASAN_OPTIONS=detect_odr_violation=0" "UBSAN_OPTIONS=print_stacktrace=1"
            "LSAN_OPTIONS=suppressions='${PROJECT_SOURCE_DIR}/.ci/lsan.supp'")
  endif()

  set(all "")
  foreach(source IN LISTS sources)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${source})
    file(STRINGS ${source} lines REGEX "^(TYPED_)?TEST(_[FP])?\\(")
    list(TRANSFORM lines REPLACE "^[A-Z_]+\\( *([A-Za-z0-9_]+).*" "\\1")
    list(REMOVE_DUPLICATES lines)
    if(NOT lines)
      continue()
    endif()
    list(TRANSFORM lines REPLACE "(.+)" "\\1.*:\\1/*:*/\\1.*:*/\\1/*" OUTPUT_VARIABLE filters)
    list(JOIN filters ":" filter)
    list(APPEND all ${filter})
    file(RELATIVE_PATH name ${PROJECT_SOURCE_DIR}/${folder} ${source})
    string(REGEX REPLACE "\\.cpp$" "" name ${name})
    add_test(NAME ${name} COMMAND torch_ext_tests --gtest_brief=1 --gtest_filter=${filter})
    set_tests_properties(${name} PROPERTIES ENVIRONMENT "${env}")
    if(name MATCHES "cuda")
      set_tests_properties(${name} PROPERTIES SKIP_REGULAR_EXPRESSION "\\[  SKIPPED \\]")
    endif()
  endforeach()
  list(JOIN all ":" filter)
  add_test(NAME other_suites COMMAND torch_ext_tests --gtest_brief=1 --gtest_filter=-${filter})
  set_tests_properties(other_suites PROPERTIES ENVIRONMENT "${env}")
endfunction()

# libcudart must be the one that torch loads, so the nvidia-* packages beside torch stand before the toolkit.
function(torch_ext_runtime_paths)
  string(REGEX MATCH "^[0-9]+" major "${TORCH_EXT_CUDA_VERSION}")
  set(relative "$ORIGIN;$ORIGIN/../../torch/lib")
  set(absolute "")
  if(major)
    foreach(package cu${major} cuda_runtime)
      list(APPEND relative "$ORIGIN/../../nvidia/${package}/lib")
      get_filename_component(folder "${TORCH_EXT_TORCH_ROOT}/../nvidia/${package}/lib" ABSOLUTE)
      if(EXISTS "${folder}")
        list(APPEND absolute "${folder}")
      endif()
    endforeach()
  endif()
  if(TORCH_EXT_WHEEL)  # no absolute path: an isolated build would bake in that of a temporary torch
    set_target_properties(torch_ext PROPERTIES INSTALL_RPATH "${relative}")
  else()
    set_target_properties(torch_ext PROPERTIES BUILD_RPATH "${absolute}" INSTALL_RPATH "${relative};${absolute}"
                                               INSTALL_RPATH_USE_LINK_PATH ON)
  endif()
  if(TORCH_EXT_PYTHON)
    set_target_properties(_C PROPERTIES BUILD_RPATH "$ORIGIN/lib" INSTALL_RPATH "$ORIGIN/lib;$ORIGIN/../torch/lib")
  endif()
endfunction()

# The same rules fill an SDK prefix and, with the prefix <site-packages>/torch_ext, the wheel.
function(torch_ext_install)
  include(CMakePackageConfigHelpers)
  set(cmake_dir share/cmake/TorchExt)
  install(TARGETS torch_ext EXPORT TorchExtTargets LIBRARY DESTINATION lib)
  install(EXPORT TorchExtTargets NAMESPACE TorchExt:: DESTINATION ${cmake_dir})
  install(DIRECTORY csrc/include/torch_ext ${PROJECT_BINARY_DIR}/include/torch_ext DESTINATION include)
  if(TORCH_EXT_WHEEL)
    set(TORCH_EXT_BUILT_TORCH_ROOT "")
  else()
    set(TORCH_EXT_BUILT_TORCH_ROOT ${TORCH_EXT_TORCH_ROOT})
  endif()
  configure_file(csrc/cmake/TorchExtConfig.cmake.in ${PROJECT_BINARY_DIR}/cmake/TorchExtConfig.cmake @ONLY)
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/cmake/TorchExtConfigVersion.cmake
                                   COMPATIBILITY SameMinorVersion)
  install(FILES ${PROJECT_BINARY_DIR}/cmake/TorchExtConfig.cmake csrc/cmake/TorchTargets.cmake
                ${PROJECT_BINARY_DIR}/cmake/TorchExtConfigVersion.cmake DESTINATION ${cmake_dir})

  set(archs "")
  if(TORCH_EXT_WITH_CUDA)
    set(archs "${TORCH_EXT_CUDA_ARCHS}")
  endif()
  set(python "")
  if(TORCH_EXT_PYTHON)
    set(python "${Python_VERSION}")
  endif()
  foreach(knob MAX_JOBS TORCH_CUDA_ARCH_LIST)
    set(${knob} "$ENV{${knob}}")
  endforeach()
  configure_file(csrc/cmake/build_info.json.in ${PROJECT_BINARY_DIR}/lib/torch_ext_build.json @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/lib/torch_ext_build.json DESTINATION lib)
  if(TORCH_EXT_PYTHON)
    install(TARGETS _C LIBRARY DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
  endif()
endfunction()

# So that the source tree itself imports.
function(torch_ext_copy_into_tree)
  set(package ${PROJECT_SOURCE_DIR}/torch_ext)
  file(MAKE_DIRECTORY ${package}/lib)
  add_custom_command(TARGET torch_ext POST_BUILD VERBATIM COMMAND ${CMAKE_COMMAND} -E copy_if_different
                     $<TARGET_FILE:torch_ext> ${PROJECT_BINARY_DIR}/lib/torch_ext_build.json ${package}/lib)
  add_custom_command(TARGET _C POST_BUILD VERBATIM
                     COMMAND ${CMAKE_COMMAND} -E copy_if_different $<TARGET_FILE:_C> ${package})
endfunction()
