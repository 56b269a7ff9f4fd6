// The widget manager typesets its labels with the calls of MathJax 2; the page has MathJax 3.
if (window.MathJax && !window.MathJax.Hub) {
  window.MathJax.Hub = {
    Queue: ([, , element]) => MathJax.startup?.promise.then(() => MathJax.typesetPromise([element])),
  };
}
