// What the theme leaves open for keyboards and screen readers.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelector(".bd-sidebar-primary")?.setAttribute("role", "complementary");
  // Wide formulas, outputs and tables scroll inside themselves: let the keyboard reach them.
  const wide = "div.math, .cell_output pre, div.highlight > pre, .pst-scrollable-table-container";
  const reach = () => {
    for (const box of document.querySelectorAll(wide)) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  };
  reach();
  window.addEventListener("resize", reach);
  window.MathJax?.startup?.promise?.then(reach);
});
