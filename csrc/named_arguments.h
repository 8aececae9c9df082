// Structs of kernels.h as Python types. Each is described once, member by member. From that description come a
// constructor that takes every member by its name, and what Python can read of the layout: `fields`, (name, C type,
// offset) for each member, and `size`. A value of an enum goes by its name.
//
// The constructor follows CPython's own calling convention: so it takes the 17 named arguments of a KdeMixture in half
// the time that pybind11 needs for them without names.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>

namespace kdejsd::python {

namespace py = pybind11;

// ----------------------------------------------------------------------------------------------------------------
// Descriptions, which bindings.cpp writes

struct Field {
  const char* name;
  const char* type;
  size_t offset;
  bool (*read)(PyObject* value, void* member);  // false: the value is of another type
};

struct Enumerator {
  const char* name;
  int value;
};

template <class T>
struct Described;

#define KDEJSD_DESCRIBE_STRUCT(Struct, ...)                                                                \
  template <>                                                                                              \
  struct Described<Struct> {                                                                               \
    using Type = Struct;                                                                                   \
    static constexpr const char* name = #Struct;                                                           \
    static constexpr const char* full_name = "kdejsd._C." #Struct;                                         \
    static constexpr Field fields[] = {__VA_ARGS__};                                                       \
    static_assert(has_members<Type, std::size(fields)>, "a member of " #Struct " is missing or repeated"); \
  };
#define MEMBER(member) \
  {#member, type_name<decltype(Type::member)>(), offsetof(Type, member), read<decltype(Type::member)>}

#define KDEJSD_DESCRIBE_ENUM(Enum, ...)                   \
  template <>                                             \
  struct Described<Enum> {                                \
    using Type = Enum;                                    \
    static constexpr const char* name = #Enum;            \
    static constexpr Enumerator values[] = {__VA_ARGS__}; \
  };
#define VALUE(value) {#value, static_cast<int>(Type::value)}

// Whether a struct has so many members: it can be made from so many values, whatever their types, and not from more.
struct Anything {
  template <class T>
  operator T() const;
};
template <class T, size_t... i>
constexpr auto is_made_from(std::index_sequence<i...>) -> decltype(T{(static_cast<void>(i), Anything())...}, true) {
  return true;
}
template <class T>
constexpr bool is_made_from(...) {
  return false;
}
template <class T, size_t count>
constexpr bool has_members =
    is_made_from<T>(std::make_index_sequence<count>()) && !is_made_from<T>(std::make_index_sequence<count + 1>());

template <class T>
constexpr const char* type_name() {
  if constexpr (std::is_same_v<T, bool>) {
    return "bool";
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return "int64_t";
  } else if constexpr (std::is_same_v<T, double>) {
    return "double";
  } else if constexpr (std::is_pointer_v<T>) {
    return "void*";
  } else {
    return Described<T>::name;
  }
}

// ----------------------------------------------------------------------------------------------------------------
// From Python

template <class Args>
struct Object {
  PyObject_HEAD Args args;
};

template <class Args>
inline PyTypeObject* type = nullptr;

inline bool is_text(PyObject* value, const char* text) {
  return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
}

template <class T>
bool read(PyObject* value, void* member) {
  T& to = *static_cast<T*>(member);
  if constexpr (std::is_same_v<T, bool>) {
    to = value == Py_True;
    return PyBool_Check(value);
  } else if constexpr (std::is_same_v<T, int64_t>) {
    to = PyLong_AsLongLong(value);
    return to != -1 || !PyErr_Occurred();
  } else if constexpr (std::is_same_v<T, double>) {
    to = PyFloat_AsDouble(value);
    return to != -1 || !PyErr_Occurred();
  } else if constexpr (std::is_pointer_v<T>) {
    to = static_cast<T>(PyLong_AsVoidPtr(value));
    return to != nullptr || !PyErr_Occurred();
  } else if constexpr (std::is_enum_v<T>) {
    for (const Enumerator& known : Described<T>::values) {
      if (!is_text(value, known.name)) continue;
      to = static_cast<T>(known.value);
      return true;
    }
    return false;
  } else {
    if (Py_TYPE(value) != type<T>) return false;
    to = reinterpret_cast<Object<T>*>(value)->args;
    return true;
  }
}

// Writes the named values into a struct; false with a Python error where they are not its members.
inline bool write(const char* name, const Field* fields, size_t count, PyObject* const* values, PyObject* names,
                  unsigned char* to) {
  const size_t given = names == nullptr ? 0 : static_cast<size_t>(PyTuple_GET_SIZE(names));
  uint64_t seen = 0;
  for (size_t i = 0; i < given; ++i) {
    PyObject* const key = PyTuple_GET_ITEM(names, i);
    size_t at = i;  // callers name the members in their order
    if (at >= count || !is_text(key, fields[at].name)) {
      for (at = 0; at < count && !is_text(key, fields[at].name);) ++at;
    }
    if (at == count) {
      PyErr_Format(PyExc_TypeError, "%s has no member %R", name, key);
      return false;
    }
    if (!fields[at].read(values[i], to + fields[at].offset)) {
      PyErr_Format(PyExc_TypeError, "%s: %s must be a value of %s, got %R", name, fields[at].name, fields[at].type,
                   values[i]);
      return false;
    }
    seen |= uint64_t{1} << at;
  }
  std::string missing;
  for (size_t at = 0; at < count; ++at) {
    if (!(seen >> at & 1)) missing += (missing.empty() ? "" : ", ") + std::string(fields[at].name);
  }
  if (!missing.empty()) PyErr_Format(PyExc_TypeError, "%s needs %s as well", name, missing.c_str());
  return missing.empty();
}

template <class Args>
PyObject* construct(PyObject*, PyObject* const* values, size_t flags, PyObject* names) {
  using Struct = Described<Args>;
  static_assert(std::is_trivially_copyable_v<Args> && std::size(Struct::fields) <= 64);
  if (const Py_ssize_t unnamed = PyVectorcall_NARGS(flags)) {
    return PyErr_Format(PyExc_TypeError, "%s takes named arguments, got %zd without a name", Struct::name, unnamed);
  }
  auto* made = PyObject_New(Object<Args>, type<Args>);
  if (made == nullptr) return nullptr;
  auto* bytes = reinterpret_cast<unsigned char*>(&made->args);
  if (write(Struct::name, Struct::fields, std::size(Struct::fields), values, names, bytes)) {
    return reinterpret_cast<PyObject*>(made);
  }
  Py_DECREF(made);
  return nullptr;
}

// The struct that a Python object holds, for as long as the object lives.
template <class Args>
const Args& struct_of(py::handle object) {
  if (Py_TYPE(object.ptr()) == type<Args>) return reinterpret_cast<Object<Args>*>(object.ptr())->args;
  throw py::type_error(std::string("the arguments must be of type ") + Described<Args>::name + ", got " +
                       Py_TYPE(object.ptr())->tp_name);
}

// ----------------------------------------------------------------------------------------------------------------
// To Python

template <class Args>
void add_struct(py::module_& m) {
  using Struct = Described<Args>;
  PyType_Slot no_slots[] = {{0, nullptr}};
  PyType_Spec spec = {Struct::full_name, sizeof(Object<Args>), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, no_slots};
  const auto made = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  if (!made) throw py::error_already_set();
  py::list fields;
  for (const Field& field : Struct::fields) fields.append(py::make_tuple(field.name, field.type, field.offset));
  made.attr("fields") = py::tuple(fields);
  made.attr("size") = sizeof(Args);
  m.attr(Struct::name) = made;
  type<Args> = reinterpret_cast<PyTypeObject*>(made.inc_ref().ptr());
  type<Args>->tp_vectorcall = construct<Args>;
}

// An enum is a dict of its values by name.
template <class Enum>
void add_enum(py::module_& m) {
  py::dict values;
  for (const Enumerator& known : Described<Enum>::values) values[known.name] = known.value;
  m.attr(Described<Enum>::name) = values;
}

}  // namespace kdejsd::python
