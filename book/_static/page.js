// A page opened from a folder may not read other pages, so the search shows titles without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// What the theme leaves open for keyboards and screen readers.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelector(".bd-sidebar-primary")?.setAttribute("role", "complementary");
  for (const toggle of document.querySelectorAll(".has-children > details > summary")) {
    toggle.setAttribute("aria-label", `Pages of ${toggle.closest("li").querySelector("a").textContent}`);
  }
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
